// Datagrams that the kernel may have joined to trains, and the clock that tells when they came.
#pragma once

#include <netinet/in.h>
#include <sys/socket.h>
#include <time.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

constexpr int kUdp = 17, kUdpSegment = 103, kUdpGro = 104;  // linux/udp.h; older headers lack some
constexpr std::size_t kTrain = 1 << 16;  // of what one reception brings

inline double now_s() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return double(now.tv_sec) + double(now.tv_nsec) * 1e-9;
}

struct Reception {
  ssize_t got;        // bytes; below 0: none, errno says why
  std::size_t size;   // of each datagram but the last
  bool cut;           // there was no room for all
  std::uint32_t address;
  std::uint16_t port;  // of the sender
};

// Receives what is there, without waiting; `into` has room for kTrain bytes.
inline Reception receive_train(int socket, void* into) {
  sockaddr_in from{};
  alignas(cmsghdr) char control[64];
  iovec all{into, kTrain};
  msghdr message{};
  message.msg_name = &from;
  message.msg_namelen = sizeof from;
  message.msg_iov = &all;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const ssize_t got = recvmsg(socket, &message, MSG_DONTWAIT);
  if (got < 0) return {got, 0, false, 0, 0};
  auto size = std::size_t(got);
  for (cmsghdr* part = CMSG_FIRSTHDR(&message); part; part = CMSG_NXTHDR(&message, part)) {
    if (part->cmsg_level == kUdp && part->cmsg_type == kUdpGro) {
      std::int32_t value;
      std::memcpy(&value, CMSG_DATA(part), sizeof value);
      if (value > 0) size = std::size_t(value);
    }
  }
  return {got, size, (message.msg_flags & MSG_TRUNC) != 0, ntohl(from.sin_addr.s_addr),
          ntohs(from.sin_port)};
}
