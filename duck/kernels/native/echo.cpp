// Ducks that compute nothing and answer at once, to measure transports with: they cost so little
// that what is measured is the host. They put asks together and answer them, and send again what is
// asked for again; telling what is missing of an ask, and all else, is the caller's.
#include "duck.h"

#if defined(__linux__)
#include <arpa/inet.h>
#include <poll.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "datagrams.h"
#include "frame.h"

namespace {

constexpr std::size_t kFrame = 1 << 20;  // bytes of a frame's payload at most
constexpr int kLookMs = 200;  // how often whoever waits looks whether it is over
constexpr long kLookNs = kLookMs * 1'000'000L;
constexpr double kLimitS = 0.5e-3;  // an answer is sent once more no sooner
constexpr long kPauseNs = 200'000;  // so long after a fragment the next ones are lost

void signal(int descriptor) {
  const std::uint64_t one = 1;
  [[maybe_unused]] const auto written = write(descriptor, &one, sizeof one);
}

// What an ask is answered with.
struct Answer {
  const std::uint8_t* message = nullptr;
  std::uint32_t bytes = 0;
  bool sealed = false;
};

// To the ask of this header. None of a sealed one whose ticket nobody has foreseen.
Answer answer_to(const duck_echo& echo, const std::uint8_t* header) {
  if (!echo.sealed) {
    const std::uint32_t rows = field<std::uint32_t>(header, kBytes) / echo.ask_row;
    const auto bytes = std::uint32_t(kStamps) + rows * echo.answer_row;
    return {reinterpret_cast<const std::uint8_t*>(echo.message), std::min(echo.most, bytes), false};
  }
  const std::uint64_t index = std::uint64_t{field<std::uint32_t>(header, kTicket)} - 1;
  if (index >= echo.tickets) return {};
  return {reinterpret_cast<const std::uint8_t*>(echo.sealed) + index * echo.sealed_bytes,
          echo.sealed_bytes, true};
}

// Makes the header of an ask that of its answer, but for the checksum.
void answers(const duck_echo& echo, std::uint8_t* header, std::uint32_t bytes) {
  header[kKind] = kAnswer;
  set(header, kSession, echo.session);
  set(header, kSource, echo.source);
  set(header, kBytes, bytes);
}

bool is_over(const duck_echo& echo) {
  return __atomic_load_n(reinterpret_cast<const std::uint32_t*>(echo.over), __ATOMIC_ACQUIRE);
}

// Answers what a slot asks, if it is new.
void look(const duck_echo& echo, duck_echo_slot& slot, int ducks, int host,
          std::vector<std::uint8_t>& room) {
  const auto* serves = reinterpret_cast<const std::uint32_t*>(slot.ticket);
  const std::uint32_t ticket = __atomic_load_n(serves, __ATOMIC_ACQUIRE);
  if (ticket == slot.seen) return;
  slot.seen = ticket;
  if (!ticket) return;
  const auto* ask = reinterpret_cast<const std::uint8_t*>(slot.ask);
  std::uint8_t header[kHeader];
  std::memcpy(header, ask, kHeader);
  const auto bytes = field<std::uint32_t>(header, kBytes);
  if (field<std::uint32_t>(header, kTicket) != ticket || bytes > slot.ask_bytes) return;
  room.resize(std::max<std::size_t>(room.size(), bytes));
  std::memcpy(room.data(), ask + kHeader, bytes);
  const std::uint32_t crc = duck_crc32c(duck_crc32c(0, header, kCrc), room.data(), bytes);
  if (crc != field<std::uint32_t>(header, kCrc)) return;
  const Answer answer = answer_to(echo, header);
  answers(echo, header, answer.bytes);
  duck_message_put(reinterpret_cast<void*>(slot.answer), header, answer.message, answer.bytes,
                   nullptr, 0);
  const auto before = duck_atomic_add_u32(reinterpret_cast<void*>(slot.count), 1);
  if (!slot.swift || int(before) + 1 >= ducks) signal(host);
}

// Receives until there are `need` bytes, perhaps more; whether they came.
bool receive(int socket, std::vector<std::uint8_t>& room, std::size_t& have, std::size_t need) {
  while (have < need) {
    const ssize_t got = recv(socket, room.data() + have, room.size() - have, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    have += std::size_t(got);
  }
  return true;
}

bool send_all(int socket, const std::vector<std::uint8_t>& bytes) {
  for (std::size_t sent = 0; sent < bytes.size();) {
    const ssize_t took = send(socket, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
    if (took < 0 && errno == EINTR) continue;
    if (took <= 0) return false;
    sent += std::size_t(took);
  }
  return true;
}

// A message cut into pieces of `piece` bytes, each after a header that says that all have `said`.
// The checksum is that of a piece and its header, or, if `whole`, that of the message and its first
// header; of a sealed message there is none.
void cut(const duck_echo& echo, const std::uint8_t* ask, const Answer& answer, std::uint32_t said,
         std::size_t piece, bool whole, std::vector<std::uint8_t>& out) {
  const std::size_t pieces = (answer.bytes + piece - 1) / piece;
  out.resize(answer.bytes + kHeader * pieces);
  std::uint8_t header[kHeader];
  std::memcpy(header, ask, kHeader);
  answers(echo, header, said);
  set(header, kFragments, std::uint16_t(pieces));
  std::uint8_t* to = out.data();
  std::uint32_t crc = 0;
  for (std::size_t index = 0; index < pieces; ++index) {
    const std::size_t begin = index * piece, size = std::min(piece, answer.bytes - begin);
    set(header, kFragment, std::uint16_t(index));
    set(header, kOffset, std::uint32_t(begin));
    if (!answer.sealed && (!whole || !index)) {
      const std::size_t covered = whole ? answer.bytes : size;
      crc = duck_crc32c(duck_crc32c(0, header, kCrc), answer.message + begin, covered);
    }
    set(header, kCrc, crc);
    std::memcpy(to, header, kHeader);
    std::memcpy(to + kHeader, answer.message + begin, size);
    to += kHeader + size;
  }
}

void send_datagrams(int socket, const std::vector<std::uint8_t>& train, std::uint16_t size,
                    sockaddr_in& to) {
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof size)] = {};
  iovec all{const_cast<std::uint8_t*>(train.data()), train.size()};
  msghdr what{};
  what.msg_name = &to;
  what.msg_namelen = sizeof to;
  what.msg_iov = &all;
  what.msg_iovlen = 1;
  if (train.size() > size) {
    what.msg_control = control;
    what.msg_controllen = sizeof control;
    cmsghdr* said = CMSG_FIRSTHDR(&what);
    said->cmsg_level = kUdp;
    said->cmsg_type = kUdpSegment;
    said->cmsg_len = CMSG_LEN(sizeof size);
    std::memcpy(CMSG_DATA(said), &size, sizeof size);
  }
  if (sendmsg(socket, &what, 0) >= 0) return;
  // A system that does not cut trains. What it refuses now is lost, and asked for again.
  for (std::size_t begin = 0; begin < train.size(); begin += size) {
    const std::size_t bytes = std::min<std::size_t>(size, train.size() - begin);
    sendto(socket, train.data() + begin, bytes, 0, reinterpret_cast<sockaddr*>(&to), sizeof to);
  }
}

// Whether all datagrams of a train are fragments of the ask that is coming, or of a newer one, which
// is the one that is coming from then on.
bool takes(duck_echo_came& coming, const duck_echo& echo, const std::uint8_t* data,
           const duck_train& train) {
  for (std::size_t begin = 0; begin < train.bytes; begin += train.size) {
    const std::uint8_t* datagram = data + begin;
    if (train.bytes - begin < kHeader || datagram[kKind] != kAsk ||
        field<std::uint32_t>(datagram, kSession) != echo.session)
      return false;
    const auto fragment = field<std::uint16_t>(datagram, kFragment);
    if (fragment >= 64 || fragment >= field<std::uint16_t>(datagram, kFragments)) return false;
    // The same but for its number and offset.
    if (std::memcmp(coming.header, datagram, kFragment) != 0 ||
        std::memcmp(coming.header + kFragments, datagram + kFragments, kOffset - kFragments) != 0) {
      std::memcpy(coming.header, datagram, kHeader);
      coming.bits = 0;
    }
    coming.bits |= std::uint64_t{1} << fragment;
  }
  return true;
}

// The bits of all its fragments.
std::uint64_t all_of(const duck_echo_came& coming) {
  const int fragments = field<std::uint16_t>(coming.header, kFragments);
  return ~std::uint64_t{0} >> (64 - std::min(64, fragments));
}

// Which answer a host waits for, if a train is the last fragment of an ask that was answered, or tells
// what is missing of the answer; and the fragments it wants, as bits. A sealed note is not for us.
duck_echo_answered* asked_again(const duck_echo& echo, const std::uint8_t* data,
                                const duck_train& train, duck_echo_answered* answered,
                                std::uint64_t& bits) {
  if (train.bytes < kHeader || train.bytes > train.size ||
      field<std::uint32_t>(data, kSession) != echo.session)
    return nullptr;
  if (data[kKind] == kAsk) {
    if (field<std::uint16_t>(data, kFragment) + 1 != field<std::uint16_t>(data, kFragments))
      return nullptr;
    bits = ~std::uint64_t{0};
  } else if (data[kKind] == kNack && !echo.sealed && train.bytes <= kHeader + sizeof bits) {
    std::memcpy(&bits, data + kHeader, train.bytes - kHeader);
  } else {
    return nullptr;
  }
  for (int i = 0; i < DUCK_ECHO_ANSWERED; ++i)
    if (answered[i].ticket == field<std::uint32_t>(data, kTicket)) return answered + i;
  return nullptr;
}

}  // namespace

void duck_echo_memory(const duck_echo* echo, duck_echo_slot* slots, int count, int ducks, int epoll,
                      int next, int host) {
  std::vector<std::uint8_t> room;
  while (!is_over(*echo)) {
    epoll_event event;
    if (epoll_wait(epoll, &event, 1, kLookMs) <= 0) continue;
    if (next >= 0) signal(next);
    for (int i = 0; i < count; ++i) look(*echo, slots[i], ducks, host, room);
  }
}

void duck_echo_stream(const duck_echo* echo, int socket, std::size_t most) {
  std::vector<std::uint8_t> room(most), out;
  const std::size_t tag = echo->sealed ? kTag : 0;
  for (std::size_t have = 0; receive(socket, room, have, kHeader);) {
    std::size_t whole = kHeader;
    if (room[kKind] == kAsk) {
      const auto bytes = field<std::uint32_t>(room.data(), kBytes);
      whole = bytes + (kHeader + tag) * field<std::uint16_t>(room.data(), kFragments);
      if (whole > most || !receive(socket, room, have, whole)) return;
      const Answer answer = answer_to(*echo, room.data());
      if (!answer.bytes) return;
      const auto said = std::uint32_t(answer.bytes - tag);
      cut(*echo, room.data(), answer, said, answer.sealed ? answer.bytes : kFrame, false, out);
      if (!send_all(socket, out)) return;
    }
    have -= whole;
    std::memmove(room.data(), room.data() + whole, have);
  }
}

void duck_echo_datagrams(const duck_echo* echo, int asks, int own, std::uint32_t address,
                         std::uint16_t port, std::size_t payload, void* room, duck_train* trains,
                         duck_echo_answered* answered, duck_echo_came* came) {
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_addr.s_addr = htonl(address);
  to.sin_port = htons(port);
  came->trains = 0;
  std::vector<std::uint8_t> out;
  const auto size = std::uint16_t(kHeader + payload);
  // Sends the answer to an ask, or these fragments of it.
  const auto send = [&](duck_echo_answered& about, std::uint64_t bits) {
    std::uint8_t ask[kHeader];
    std::memcpy(ask, came->header, kHeader);
    set(ask, kTicket, about.ticket);
    set(ask, kLayer, about.layer);
    set(ask, kBytes, about.bytes);
    const Answer answer = answer_to(*echo, ask);
    cut(*echo, ask, answer, answer.bytes, payload, true, out);
    if (bits == ~std::uint64_t{0}) return send_datagrams(own, out, size, to);
    for (std::size_t begin = 0; begin < out.size() && bits; begin += size, bits >>= 1)
      if (bits & 1)
        sendto(own, out.data() + begin, std::min<std::size_t>(size, out.size() - begin), 0,
               reinterpret_cast<const sockaddr*>(&to), sizeof to);
  };
  const std::uint8_t* const ask = came->header;
  std::size_t used = 0;
  bool loose = false;  // what comes is the caller's: all that is there at once
  while (!is_over(*echo)) {
    pollfd there[] = {{asks, POLLIN, 0}, {own, POLLIN, 0}};
    const timespec wait{0, loose ? 0 : came->trains ? kPauseNs : kLookNs};
    if (ppoll(there, 2, &wait, nullptr) <= 0) {
      if (came->trains) return;
      continue;
    }
    auto* data = static_cast<std::uint8_t*>(room) + used;
    duck_train& train = trains[came->trains];
    // What was said to all comes first: what is said to one may be about it.
    const Reception received = receive_train(there[0].revents ? asks : own, data);
    if (received.got <= 0) continue;
    train = {std::uint32_t(used), std::uint32_t(received.got), std::uint32_t(received.size),
             received.address, received.port};
    std::uint64_t bits = 0;
    if (duck_echo_answered* about = asked_again(*echo, data, train, answered, bits)) {
      const double now = now_s();
      if (now - about->resent_at > kLimitS) {
        about->resent_at = now;
        send(*about, bits);
      }
      continue;
    }
    ++came->trains;
    used += train.bytes;
    if (came->trains == DUCK_ECHO_TRAINS || used + kTrain > DUCK_ECHO_BYTES) return;
    if (!takes(*came, *echo, data, train)) {
      loose = true;
      continue;
    }
    const std::uint64_t all = all_of(*came);
    // The caller tells the host what is missing; what comes of that is looked at here again.
    loose = loose || (came->bits != all && came->bits > all >> 1);
    if (came->bits != all) continue;
    if (!answer_to(*echo, ask).bytes) return;
    duck_echo_answered& about = answered[came->answered % DUCK_ECHO_ANSWERED];
    about = {field<std::uint32_t>(ask, kTicket), field<std::uint32_t>(ask, kBytes),
             field<std::uint16_t>(ask, kLayer), 0, 0, 0.0};
    __atomic_store_n(&came->answered, came->answered + 1, __ATOMIC_RELEASE);
    send(about, ~std::uint64_t{0});
    came->bits = 0;
    if (loose) continue;  // something else came with it
    used = 0;
    came->trains = 0;
  }
}

#else  // they are measured on Linux

void duck_echo_memory(const duck_echo*, duck_echo_slot*, int, int, int, int, int) {}
void duck_echo_stream(const duck_echo*, int, std::size_t) {}
void duck_echo_datagrams(const duck_echo*, int, int, std::uint32_t, std::uint16_t, std::size_t,
                         void*, duck_train*, duck_echo_answered*, duck_echo_came*) {}

#endif
