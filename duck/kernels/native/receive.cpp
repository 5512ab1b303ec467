// Asks into sockets, and answers out of them into rows: what Python would do for every packet, in
// one call an ask and one a wake-up.
//
// A header decides nothing here but whether it is exactly the one that an open ask wants. Then its
// body goes to the place that the ask has for this duck, and nowhere else; whatever differs in a bit
// is the caller's to look at. A fragment that has come is never written again while its ask is open.
#include "duck.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#if defined(__linux__)
#include <netinet/in.h>
#include <sys/epoll.h>
#include <sys/socket.h>

namespace {

constexpr std::size_t kHeader = 32, kCrc = 28, kTicket = 8, kSource = 14;
constexpr std::size_t kFragment = 16, kFragments = 18, kBytes = 20, kOffset = 24;
constexpr int kUdp = 17, kUdpGro = 104;  // linux/udp.h; older headers lack it
constexpr std::size_t kLargest = 1 << 16;  // of what one reception brings
constexpr int kMostCalls = 512;            // whoever floods us does not stop the caller

template <typename T>
T field(const std::uint8_t* header, std::size_t offset) {
  T value;
  std::memcpy(&value, header + offset, sizeof value);
  return value;
}

std::uint64_t& missing(const duck_waiting& ask, int duck) {
  return reinterpret_cast<std::uint64_t*>(ask.missing)[duck];
}

std::uint8_t* body(const duck_waiting& ask, int duck) {
  return reinterpret_cast<std::uint8_t*>(ask.place) + duck * ask.stride;
}

// The header of this duck's answer, up to the checksum.
void want(const duck_waiting& ask, int duck, std::uint8_t* header) {
  std::memcpy(header, ask.front, kCrc);
  const auto source = static_cast<std::uint16_t>(duck);
  std::memcpy(header + kSource, &source, sizeof source);
}

std::uint8_t judged(const duck_waiting& ask, const std::uint8_t* header, const std::uint8_t* body,
                    std::uint32_t crc) {
  if (!ask.check) return DUCK_MESSAGE_GOOD;
  const std::size_t bytes = field<std::uint32_t>(header, kBytes);
  return duck_crc32c(duck_crc32c(0, header, kCrc), body, bytes) == crc ? DUCK_MESSAGE_GOOD
                                                                       : DUCK_MESSAGE_BAD;
}

// One reception of a connection; its event, if there is one.
bool receive(int duck, duck_inlet& inlet, const duck_waiting* asks, int count, duck_event& event) {
  event = {inlet.ticket, static_cast<std::uint16_t>(duck), DUCK_EVENT_READABLE, 0, 1};
  if (inlet.off) return true;
  const duck_waiting* ask = nullptr;
  for (int i = 0; i < count && !ask; ++i) {
    if (inlet.have ? field<std::uint32_t>(asks[i].front, kTicket) == inlet.ticket
                   : missing(asks[i], duck) != 0)
      ask = asks + i;
  }
  if (!ask) return true;
  if (!inlet.have) {
    inlet.place = reinterpret_cast<std::uint64_t>(body(*ask, duck) - kHeader);
    inlet.ticket = field<std::uint32_t>(ask->front, kTicket);
    inlet.size = kHeader + field<std::uint32_t>(ask->front, kBytes) + ask->seal;
    event.ticket = inlet.ticket;
  }
  auto* place = reinterpret_cast<std::uint8_t*>(inlet.place);
  const ssize_t got =
      recv(inlet.socket, place + inlet.have, inlet.size - inlet.have, MSG_DONTWAIT);
  if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) return false;
  if (got <= 0) {
    event.what = DUCK_EVENT_ENDED;
    event.error = static_cast<std::uint8_t>(got < 0 ? errno : 0);
    inlet.off = 1;
    return true;
  }
  ++inlet.calls;
  inlet.have += static_cast<std::uint32_t>(got);
  if (inlet.have < kCrc) return false;
  std::uint8_t header[kCrc];
  want(*ask, duck, header);
  if (std::memcmp(place, header, kCrc) != 0) {
    inlet.off = 1;
    event.what = DUCK_MESSAGE_OTHER;
    return true;
  }
  if (inlet.have < inlet.size) return false;
  event.what = judged(*ask, header, place + kHeader, field<std::uint32_t>(place, kCrc));
  missing(*ask, duck) = 0;
  inlet.have = 0;
  return true;
}

// Takes what belongs to one answer from the front of a train; how many bytes that is.
std::size_t take(const std::uint8_t* train, std::size_t bytes, std::size_t size,
                 std::size_t payload, const duck_waiting& ask, int duck, duck_event& event) {
  std::uint8_t header[kCrc];
  want(ask, duck, header);
  const auto fragments = field<std::uint16_t>(header, kFragments);
  const std::size_t message = field<std::uint32_t>(header, kBytes);
  const auto first = field<std::uint16_t>(train, kFragment);
  const auto crc = field<std::uint32_t>(train, kCrc);
  std::uint64_t bits = 0;
  std::size_t end = 0;
  if (fragments > 64) return 0;
  for (std::size_t index = first; index < fragments && end < bytes; ++index) {
    const std::uint8_t* datagram = train + end;
    const std::size_t length = std::min(size, bytes - end);
    const std::size_t offset = index * payload;
    if (length < kHeader || offset >= message ||
        std::memcmp(datagram, header, kFragment) != 0 ||
        field<std::uint16_t>(datagram, kFragment) != index ||
        std::memcmp(datagram + kFragments, header + kFragments, kOffset - kFragments) != 0 ||
        field<std::uint32_t>(datagram, kOffset) != offset ||
        field<std::uint32_t>(datagram, kCrc) != crc ||
        length - kHeader != std::min(payload, message - offset))
      break;
    bits |= std::uint64_t{1} << index;
    end += length;
  }
  if (!bits || bits & ~missing(ask, duck)) return 0;
  std::uint8_t* const to = body(ask, duck);
  for (std::size_t at = 0, offset = first * payload; at < end; at += size, offset += payload)
    std::memcpy(to + offset, train + at + kHeader, std::min(size, end - at) - kHeader);
  missing(ask, duck) &= ~bits;
  const bool whole = !missing(ask, duck);
  event = {field<std::uint32_t>(ask.front, kTicket), static_cast<std::uint16_t>(duck),
           whole ? judged(ask, header, to, crc) : std::uint8_t{DUCK_MESSAGE_NONE}, 0, bits};
  return end;
}

}  // namespace

int duck_inlets_receive(int epoll, duck_inlet* inlets, int ducks, const duck_waiting* asks,
                        int count, duck_event* events, int most) {
  epoll_event ready[64];
  const int readable = epoll_wait(epoll, ready, std::min(most, 64), 0);
  int made = 0;
  for (int i = 0; i < readable; ++i) {
    int duck = 0;
    while (duck < ducks && inlets[duck].socket != ready[i].data.fd) ++duck;
    if (duck < ducks) made += receive(duck, inlets[duck], asks, count, events[made]);
  }
  return made;
}

int duck_inlets_send(const duck_inlet* inlets, int ducks, const void* data, std::size_t bytes,
                     std::int64_t* sent) {
  int whole = 0;
  for (int duck = 0; duck < ducks; ++duck) {
    const ssize_t took = send(inlets[duck].socket, data, bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
    sent[duck] = took < 0 ? 0 : took;
    whole += sent[duck] == static_cast<std::int64_t>(bytes);
  }
  return whole;
}

void duck_datagrams_receive(int socket, void* buffer, std::size_t room, std::size_t payload,
                            const duck_waiting* asks, int count, const std::uint64_t* senders,
                            int ducks, duck_event* events, int most_events, duck_train* trains,
                            int most_trains, duck_drained* drained) {
  auto* const base = static_cast<std::uint8_t*>(buffer);
  std::size_t at = 0;
  *drained = {};
  drained->more = 1;
  // A train holds fewer messages than it has datagrams, of which there are at most 64.
  while (at + kLargest <= room && drained->events + 64 <= most_events &&
         drained->trains < most_trains && drained->calls < kMostCalls) {
    sockaddr_in sender{};
    alignas(cmsghdr) char control[64];
    iovec vector{base + at, kLargest};
    msghdr message{};
    message.msg_name = &sender;
    message.msg_namelen = sizeof sender;
    message.msg_iov = &vector;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    const ssize_t got = recvmsg(socket, &message, MSG_DONTWAIT);
    if (got < 0) {
      if (errno == EAGAIN || errno == EWOULDBLOCK) {
        drained->more = 0;
        return;
      }
      if (errno == EBADF || errno == ENOTSOCK) return;
      ++drained->calls;  // an ICMP message about something sent before: it was lost, no more
      continue;
    }
    ++drained->calls;
    const auto bytes = static_cast<std::size_t>(got);
    std::size_t size = bytes;
    for (cmsghdr* part = CMSG_FIRSTHDR(&message); part; part = CMSG_NXTHDR(&message, part)) {
      if (part->cmsg_level == kUdp && part->cmsg_type == kUdpGro) {
        std::int32_t value;
        std::memcpy(&value, CMSG_DATA(part), sizeof value);
        if (value > 0) size = static_cast<std::size_t>(value);
      }
    }
    drained->datagrams += bytes ? static_cast<int>((bytes + size - 1) / size) : 1;
    if (!bytes || message.msg_flags & MSG_TRUNC) continue;
    const std::uint64_t from =
        std::uint64_t{ntohl(sender.sin_addr.s_addr)} << 16 | ntohs(sender.sin_port);
    std::size_t done = 0;
    while (bytes - done > kHeader) {
      const std::uint8_t* train = base + at + done;
      const auto duck = field<std::uint16_t>(train, kSource);
      if (duck >= ducks || senders[duck] != from) break;
      const auto ticket = field<std::uint32_t>(train, kTicket);
      std::size_t taken = 0;
      for (int i = 0; i < count && !taken; ++i) {
        if (field<std::uint32_t>(asks[i].front, kTicket) != ticket) continue;
        duck_event event;
        taken = take(train, bytes - done, size, payload, asks[i], duck, event);
        if (!taken) break;
        // Datagrams that the kernel did not join: one event for neighbours.
        duck_event* last = drained->events ? events + drained->events - 1 : nullptr;
        if (last && last->ticket == ticket && last->duck == duck &&
            last->what == DUCK_MESSAGE_NONE) {
          last->bits |= event.bits;
          last->what = event.what;
        } else {
          events[drained->events++] = event;
        }
      }
      if (!taken) break;
      done += taken;
    }
    if (done < bytes) {
      trains[drained->trains++] = {static_cast<std::uint32_t>(at + done),
                                   static_cast<std::uint32_t>(bytes - done),
                                   static_cast<std::uint32_t>(size),
                                   static_cast<std::uint32_t>(from >> 16),
                                   static_cast<std::uint32_t>(from & 0xFFFF)};
      at += bytes;
    }
  }
}

#else  // the asyncio way serves elsewhere

int duck_inlets_receive(int, duck_inlet*, int, const duck_waiting*, int, duck_event*, int) {
  return 0;
}

int duck_inlets_send(const duck_inlet*, int ducks, const void*, std::size_t, std::int64_t* sent) {
  for (int duck = 0; duck < ducks; ++duck) sent[duck] = 0;
  return 0;
}

void duck_datagrams_receive(int, void*, std::size_t, std::size_t, const duck_waiting*, int,
                            const std::uint64_t*, int, duck_event*, int, duck_train*, int,
                            duck_drained* drained) {
  *drained = {};
}

#endif
