// Messages in memory that several processes share: a header of 32 bytes, then the body.
//
// The last four bytes of the header are the CRC-32C of the 28 before them and of the body. The
// ticket, at offset 8, is written last and read first. A reader copies the body into memory of its
// own and believes the copy only when its checksum is right: whatever the writer, or anybody else
// who has the memory, does to it meanwhile or afterwards.
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "duck.h"
#include "frame.h"
#include "rows.h"

namespace {

constexpr std::uint16_t kHost = 0xFFFF;
// So much is copied before it is summed: it is in the nearest cache then.
constexpr std::size_t kBlock = 15 * 1024;

template <typename T>
T* at(std::uint64_t address) {
  return reinterpret_cast<T*>(address);
}

// Copies a body and continues a checksum over the copy.
std::uint32_t copy(const std::uint8_t* from, std::uint8_t* to, std::size_t bytes,
                   std::uint32_t crc) {
  for (std::size_t at = 0; at < bytes; at += kBlock) {
    const std::size_t size = std::min(kBlock, bytes - at);
    std::memcpy(to + at, from + at, size);
    crc = duck_crc32c(crc, to + at, size);
  }
  return crc;
}

// Whether a message has the ticket that is wanted. What lies there was written before it.
bool is_there(const std::uint8_t* place, const void* want) {
  const auto* ticket = reinterpret_cast<const std::uint32_t*>(place + kTicket);
  return __atomic_load_n(ticket, __ATOMIC_ACQUIRE) ==
         field<std::uint32_t>(static_cast<const std::uint8_t*>(want), kTicket);
}

// The header that is wanted of the message at an index, up to the checksum.
void expect(const void* want, std::size_t index, std::uint8_t* header) {
  std::memcpy(header, want, kCrc);
  std::uint16_t source;
  std::memcpy(&source, header + kSource, sizeof source);
  set(header, kSource, std::uint16_t(source + index));
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
  __atomic_store_n(ticket, field<std::uint32_t>(head, kTicket), __ATOMIC_SEQ_CST);
}

int duck_messages_get(const void* places, std::size_t stride, int count, const void* want,
                      std::size_t bytes, void* rows, std::size_t row_stride, std::uint8_t* states) {
  int known = 0;
  for (int index = 0; index < count; ++index) {
    if (states[index] != DUCK_MESSAGE_NONE) {
      ++known;
      continue;
    }
    const auto* place = static_cast<const std::uint8_t*>(places) + index * stride;
    if (!is_there(place, want)) continue;
    std::uint8_t head[kHeader], expected[kCrc];
    std::memcpy(head, place, kHeader);
    expect(want, index, expected);
    ++known;
    if (std::memcmp(head, expected, kCrc) != 0) {
      states[index] = DUCK_MESSAGE_OTHER;
      continue;
    }
    auto* to = static_cast<std::uint8_t*>(rows) + index * row_stride;
    const std::uint32_t crc = copy(place + kHeader, to, bytes, duck_crc32c(0, head, kCrc));
    states[index] = crc == field<std::uint32_t>(head, kCrc) ? DUCK_MESSAGE_GOOD : DUCK_MESSAGE_BAD;
  }
  return known;
}

void duck_slot_ask(duck_slot* slot, std::uint32_t ticket, std::uint16_t layer, std::uint32_t bytes,
                   const void* body, std::size_t body_bytes) {
  std::memset(at<std::uint8_t>(slot->states), DUCK_MESSAGE_NONE, slot->ducks);
  set(slot->want, kTicket, ticket);
  set(slot->want, kLayer, layer);
  set(slot->want, kBytes, bytes);
  slot->bytes = bytes;
  std::uint8_t header[kCrc];
  std::memcpy(header, slot->want, kCrc);
  set(header, kKind, kAsk);
  set(header, kSource, kHost);
  set(header, kBytes, std::uint32_t(body_bytes));
  auto* serves = at<std::uint32_t>(slot->ticket);
  __atomic_store_n(serves, 0u, __ATOMIC_SEQ_CST);  // whoever still copies the last ask sees it
  __atomic_store_n(at<std::uint32_t>(slot->count), 0u, __ATOMIC_SEQ_CST);
  duck_message_put(at<void>(slot->ask), header, body, body_bytes, nullptr, 0);
  __atomic_store_n(serves, ticket, __ATOMIC_SEQ_CST);
  const std::uint64_t one = 1;
  // It fails when it was written to 2^64 times and nobody looked.
  [[maybe_unused]] const auto written = write(slot->wake, &one, sizeof one);
}

int duck_slot_look(duck_slot* slot) {
  auto* states = at<std::uint8_t>(slot->states);
  int known = 0;
  bool good = true;
  for (std::uint32_t duck = 0; duck < slot->ducks; ++duck) {
    std::uint8_t& state = states[duck];
    const auto* place = at<const std::uint8_t>(slot->answers) + duck * slot->stride;
    if (state == DUCK_MESSAGE_NONE && is_there(place, slot->want)) {
      std::uint8_t expected[kCrc];
      expect(slot->want, duck, expected);
      if (std::memcmp(place, expected, kCrc) != 0) {
        state = DUCK_MESSAGE_OTHER;
      } else {
        state = DUCK_MESSAGE_GOOD;
        std::memcpy(at<std::uint8_t>(slot->rows) + duck * slot->row_stride, place + kHeader,
                    kStamps);
      }
    }
    known += state != DUCK_MESSAGE_NONE;
    good = good && state <= DUCK_MESSAGE_GOOD;
  }
  return good ? known : -1;
}

int duck_slot_take(duck_slot* slot) {
  auto* states = at<std::uint8_t>(slot->states);
  const int count = int(slot->ducks);
  const int known = duck_messages_get(at<void>(slot->answers), slot->stride, count, slot->want,
                                      slot->bytes, at<void>(slot->rows), slot->row_stride, states);
  const bool good =
      std::all_of(states, states + count, [](std::uint8_t s) { return s <= DUCK_MESSAGE_GOOD; });
  return good ? known : -1;
}

int duck_slot_sum(const duck_slot* slot, int bf16, float* to, int* bad) {
  // What is checked and what is added is the same copy: the message itself may change in between.
  alignas(64) std::uint8_t block[kBlock];
  const std::size_t size = bf16 ? sizeof(std::uint16_t) : sizeof(float);
  const std::size_t bytes = slot->bytes - kStamps;
  for (std::uint32_t duck = 0; duck < slot->ducks; ++duck) {
    const auto* place = at<const std::uint8_t>(slot->answers) + duck * slot->stride;
    std::uint8_t head[kHeader + kStamps], expected[kCrc];
    std::memcpy(head, place, sizeof head);
    expect(slot->want, duck, expected);
    std::uint32_t crc = duck_crc32c(duck_crc32c(0, expected, kCrc), head + kHeader, kStamps);
    for (std::size_t begin = 0; begin < bytes; begin += kBlock) {
      const std::size_t some = std::min(kBlock, bytes - begin);
      std::memcpy(block, place + kHeader + kStamps + begin, some);
      crc = duck_crc32c(crc, block, some);
      duck_row_add(block, some / size, bf16, duck == 0, to + begin / size);
    }
    if (crc != field<std::uint32_t>(head, kCrc)) {
      *bad = int(duck);
      return 0;
    }
  }
  *bad = -1;
  return duck_row_is_finite(to, bytes / size);
}
