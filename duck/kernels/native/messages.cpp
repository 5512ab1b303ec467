// Messages in memory that several processes share: a header of 32 bytes, then the body.
//
// The last four bytes of the header are the CRC-32C of the 28 before them and of the body. The
// ticket, at offset 8, is written last and read first. A reader copies the body into memory of its
// own and believes the copy only when its checksum is right: whatever the writer, or anybody else
// who has the memory, does to it meanwhile or afterwards.
#include <cstring>

#include "duck.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr std::size_t kHeader = 32, kCrc = 28, kTicket = 8, kSource = 14;
// So many messages are copied side by side: the checksum of one waits for its own last word.
constexpr int kLanes = 4;

struct Lane {
  const std::uint8_t* from;
  std::uint8_t* to;
  std::uint32_t want;
  std::uint64_t crc;
  std::uint8_t* state;
};

std::uint32_t field(const std::uint8_t* header, std::size_t offset) {
  std::uint32_t value;
  std::memcpy(&value, header + offset, sizeof value);
  return value;
}

// Copies `bytes` of every lane and runs its checksum over what was copied: each word is loaded
// once, so the copy and the checksum are of the same bytes even if they change.
void copy_by_table(Lane* lanes, int count, std::size_t bytes) {
  for (int lane = 0; lane < count; ++lane) {
    for (std::size_t at = 0; at < bytes; ++at)
      lanes[lane].to[at] = __atomic_load_n(lanes[lane].from + at, __ATOMIC_RELAXED);
    lanes[lane].crc = ~duck_crc32c(~std::uint32_t(lanes[lane].crc), lanes[lane].to, bytes);
  }
}

#if defined(__x86_64__)
template <int count>
__attribute__((target("sse4.2"))) void copy_lanes(Lane* lanes, std::size_t bytes) {
  std::uint64_t crc[count];
  for (int lane = 0; lane < count; ++lane) crc[lane] = lanes[lane].crc;
  std::size_t at = 0;
  for (; at + 8 <= bytes; at += 8)
    for (int lane = 0; lane < count; ++lane) {
      const std::uint64_t word = __atomic_load_n(
          reinterpret_cast<const std::uint64_t*>(lanes[lane].from + at), __ATOMIC_RELAXED);
      std::memcpy(lanes[lane].to + at, &word, sizeof word);
      crc[lane] = _mm_crc32_u64(crc[lane], word);
    }
  for (; at < bytes; ++at)
    for (int lane = 0; lane < count; ++lane) {
      const std::uint8_t byte = __atomic_load_n(lanes[lane].from + at, __ATOMIC_RELAXED);
      lanes[lane].to[at] = byte;
      crc[lane] = _mm_crc32_u8(std::uint32_t(crc[lane]), byte);
    }
  for (int lane = 0; lane < count; ++lane) lanes[lane].crc = crc[lane];
}
#endif

void copy(Lane* lanes, int count, std::size_t bytes) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) {
    if (count == kLanes) return copy_lanes<kLanes>(lanes, bytes);
    for (int lane = 0; lane < count; ++lane) copy_lanes<1>(lanes + lane, bytes);
    return;
  }
#endif
  copy_by_table(lanes, count, bytes);
}

}  // namespace

void duck_message_put(void* place, const void* header, const void* first, std::size_t first_bytes,
                      const void* second, std::size_t second_bytes) {
  auto* to = static_cast<std::uint8_t*>(place);
  std::uint8_t head[kHeader];
  std::memcpy(head, header, kCrc);
  std::uint32_t crc = duck_crc32c(0, head, kCrc);
  crc = duck_crc32c(duck_crc32c(crc, first, first_bytes), second, second_bytes);
  std::memcpy(head + kCrc, &crc, sizeof crc);
  auto* ticket = reinterpret_cast<std::uint32_t*>(to + kTicket);
  __atomic_store_n(ticket, 0u, __ATOMIC_RELAXED);  // what was here is over
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  std::memcpy(to + kHeader, first, first_bytes);
  if (second_bytes) std::memcpy(to + kHeader + first_bytes, second, second_bytes);
  std::memcpy(to, head, kTicket);
  std::memcpy(to + kTicket + 4, head + kTicket + 4, kHeader - kTicket - 4);
  __atomic_store_n(ticket, field(head, kTicket), __ATOMIC_SEQ_CST);
}

int duck_messages_get(const void* places, std::size_t stride, int count, const void* want,
                      std::size_t bytes, void* rows, std::size_t row_stride, std::uint8_t* states) {
  std::uint8_t expected[kHeader];
  std::memcpy(expected, want, kCrc);
  std::uint16_t source;
  std::memcpy(&source, expected + kSource, sizeof source);
  Lane lanes[kLanes];
  int filled = 0, known = 0;
  const auto empty = [&] {
    copy(lanes, filled, bytes);
    for (int lane = 0; lane < filled; ++lane)
      *lanes[lane].state =
          ~std::uint32_t(lanes[lane].crc) == lanes[lane].want ? DUCK_MESSAGE_GOOD : DUCK_MESSAGE_BAD;
    filled = 0;
  };
  for (int index = 0; index < count; ++index) {
    if (states[index] != DUCK_MESSAGE_NONE) {
      ++known;
      continue;
    }
    const auto* place = static_cast<const std::uint8_t*>(places) + index * stride;
    const auto* ticket = reinterpret_cast<const std::uint32_t*>(place + kTicket);
    if (__atomic_load_n(ticket, __ATOMIC_ACQUIRE) != field(expected, kTicket)) continue;
    std::uint8_t head[kHeader];
    std::memcpy(head, place, kHeader);
    const auto from = std::uint16_t(source + index);
    std::memcpy(expected + kSource, &from, sizeof from);
    ++known;
    if (std::memcmp(head, expected, kCrc) != 0) {
      states[index] = DUCK_MESSAGE_OTHER;
      continue;
    }
    lanes[filled++] = {place + kHeader, static_cast<std::uint8_t*>(rows) + index * row_stride,
                       field(head, kCrc), std::uint32_t(~duck_crc32c(0, head, kCrc)),
                       states + index};
    if (filled == kLanes) empty();
  }
  empty();
  return known;
}
