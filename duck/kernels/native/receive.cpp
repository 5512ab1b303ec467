// Asks into sockets, and answers out of them into rows: what Python would do for every packet, done
// by a thread of ours that wakes Python once a round.
//
// A header decides nothing here but whether it is exactly the one that an open ask wants. Then its
// body goes to the place that the ask has for this duck, and nowhere else; whatever differs in a bit
// is the caller's to look at. A fragment that has come is never written again while its ask is open,
// and nothing is written for an ask that is not open any more.
#include "duck.h"

#if defined(__linux__)
#include <fcntl.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "datagrams.h"
#include "frame.h"

namespace {

constexpr std::size_t kStretch = 256 << 10;  // of what one of a stream does, the lock being held
constexpr int kMostCalls = 128;              // whoever floods us holds nobody up
constexpr int kPauseMs = 1;  // so long without an answer in a round that has begun is told
constexpr std::size_t kMessages = 64;  // that one reception can bring at most

struct OpenAsk {
  std::array<std::uint8_t, kCrc> front;  // the header of duck 0's answer, up to the checksum
  std::uint8_t* place;                   // where duck 0's body goes
  std::size_t stride;                    // from one duck's to the next
  std::vector<std::uint64_t> missing;    // of every duck the fragments that have not come, as bits
  int owing;                             // ducks that lack some
  bool begun = false;                    // something has come

  std::uint32_t ticket() const { return field<std::uint32_t>(front.data(), kTicket); }
  std::uint16_t fragments() const { return field<std::uint16_t>(front.data(), kFragments); }
  std::uint32_t bytes() const { return field<std::uint32_t>(front.data(), kBytes); }
  std::uint64_t full() const { return ~std::uint64_t{0} >> (64 - fragments()); }
  std::uint8_t* body(int duck) const { return place + duck * stride; }

  // The header of this duck's answer, up to the checksum.
  std::array<std::uint8_t, kCrc> want(int duck) const {
    auto header = front;
    const auto source = static_cast<std::uint16_t>(duck);
    std::memcpy(header.data() + kSource, &source, sizeof source);
    return header;
  }

  void came(int duck, std::uint64_t bits) {
    if (!missing[duck]) return;
    missing[duck] &= ~bits;
    owing -= !missing[duck];
    begun = true;
  }
};

// A connection, received from while the header of what comes is the one that is wanted.
struct Inlet {
  int socket = -1;
  bool on = false;
  std::uint8_t* place = nullptr;  // of the frame that is being received, header and all
  std::uint32_t ticket = 0;
  std::size_t have = 0;  // bytes of it; 0: between two frames
  std::size_t size = 0;
};

}  // namespace

// One lock guards all of it but what never changes. Python holds the GIL while it waits for the
// lock, and the thread, which gives it back after every socket, never wants the GIL.
struct duck_receiver {
  duck_receiver(int ducks, std::size_t payload, int seal, int check, std::uint32_t* calls)
      : calls_(calls),
        payload_(payload),
        seal_(std::size_t(seal)),
        check_(check != 0),
        inlets_(ducks),
        senders_(ducks) {
    buffer_.resize(DUCK_MOST_BYTES);
    events_.reserve(DUCK_MOST_EVENTS);
    trains_.reserve(DUCK_MOST_TRAINS);
  }

  ~duck_receiver() {
    if (thread_.joinable()) {
      {
        const std::lock_guard<std::mutex> held(lock_);
        stopping_ = true;
      }
      eventfd_write(stop_, 1);
      room_.notify_all();
      thread_.join();
    }
    for (const Inlet& inlet : inlets_)
      if (inlet.socket >= 0) close(inlet.socket);
    for (const int descriptor : {epoll_, stop_, wake_})
      if (descriptor >= 0) close(descriptor);
  }

  // 0, or what the system said.
  int start(bool threaded) {
    epoll_ = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_ < 0) return errno;
    if (!threaded) return 0;
    stop_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (stop_ < 0 || wake_ < 0) return errno;
    if (const int error = watch(stop_, kStop)) return error;
    // Signals are the main thread's business.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = 0;
    try {
      thread_ = std::thread([this] { run(); });
    } catch (const std::system_error& refused) {
      error = refused.code().value();
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return error;
  }

  int descriptor() const { return wake_ >= 0 ? wake_ : epoll_; }

  int connection(int duck, int socket) {
    // One of our own: a number that somebody closes may be another connection's a moment later.
    const int own = fcntl(socket, F_DUPFD_CLOEXEC, 0);
    if (own < 0) return errno;
    const std::lock_guard<std::mutex> held(lock_);
    Inlet& inlet = inlets_[duck];
    inlet.socket = own;
    inlet.on = true;
    return watch(own, duck);
  }

  int datagrams(int socket) {
    const std::lock_guard<std::mutex> held(lock_);
    sockets_.push_back(socket);
    return watch(socket, kSockets + std::uint32_t(sockets_.size()) - 1);
  }

  void sender(int duck, std::uint64_t address) {
    const std::lock_guard<std::mutex> held(lock_);
    senders_[duck] = address;
  }

  void open(const void* front, void* place, std::size_t stride) {
    OpenAsk ask;
    std::memcpy(ask.front.data(), front, kCrc);
    ask.place = static_cast<std::uint8_t*>(place);
    ask.stride = stride;
    ask.owing = int(inlets_.size());
    const std::lock_guard<std::mutex> held(lock_);
    if (!spare_.empty()) {
      ask.missing = std::move(spare_.back());
      spare_.pop_back();
    }
    ask.missing.assign(inlets_.size(), ask.full());
    asks_.push_back(std::move(ask));
  }

  int forget(std::uint32_t ticket, std::uint16_t* ducks) {
    const std::lock_guard<std::mutex> held(lock_);
    const auto ask = find(ticket);
    if (ask == asks_.end()) return 0;
    int count = 0;
    for (std::size_t duck = 0; duck < inlets_.size(); ++duck) {
      Inlet& inlet = inlets_[duck];
      if (inlet.have && inlet.ticket == ticket) {
        leave(inlet);
        ducks[count++] = static_cast<std::uint16_t>(duck);
      }
    }
    // What was to be said of these parts is said by handing them over.
    const auto over = [&](const duck_event& event) {
      return event.what == DUCK_MESSAGE_OTHER && event.ticket == ticket;
    };
    events_.erase(std::remove_if(events_.begin(), events_.end(), over), events_.end());
    spare_.push_back(std::move(ask->missing));
    asks_.erase(ask);
    return count;
  }

  void came(std::uint32_t ticket, int duck) {
    const std::lock_guard<std::mutex> held(lock_);
    const auto ask = find(ticket);
    if (ask == asks_.end()) return;
    ask->came(duck, ask->full());
    // The round may be complete by it: what was to wait for its end must not wait for a pause.
    if (wake_ >= 0 && !ask->owing && !events_.empty() && !told_) {
      told_ = true;
      eventfd_write(wake_, 1);
    }
  }

  bool wants(std::uint32_t ticket, int duck) {
    const std::lock_guard<std::mutex> held(lock_);
    const auto ask = find(ticket);
    return ask == asks_.end() || ask->missing[duck];
  }

  void again(std::uint32_t ticket, int duck) {
    const std::lock_guard<std::mutex> held(lock_);
    const auto ask = find(ticket);
    if (ask == asks_.end()) return;
    ask->owing += !ask->missing[duck];
    ask->missing[duck] = ask->full();
  }

  std::size_t begun(int duck, void* to, std::size_t room) {
    const std::lock_guard<std::mutex> held(lock_);
    Inlet& inlet = inlets_[duck];
    const std::size_t have = inlet.have;
    if (have > room) return have;
    std::memcpy(to, inlet.place, have);
    inlet.have = 0;
    leave(inlet);
    return have;
  }

  int resume(int duck) {
    const std::lock_guard<std::mutex> held(lock_);
    Inlet& inlet = inlets_[duck];
    if (inlet.on || inlet.socket < 0) return 0;
    inlet.on = true;
    return watch(inlet.socket, duck);
  }

  void drop(int duck) {
    const std::lock_guard<std::mutex> held(lock_);
    Inlet& inlet = inlets_[duck];
    leave(inlet);
    inlet.have = 0;
    if (inlet.socket >= 0) close(inlet.socket);
    inlet.socket = -1;
  }

  void collect(duck_event* events, duck_train* trains, void* buffer, duck_collected* collected) {
    const std::lock_guard<std::mutex> held(lock_);
    if (!full()) {
      epoll_event ready[kReady];
      handle(ready, epoll_wait(epoll_, ready, kReady, 0));
    }
    if (told_) {
      eventfd_t value;
      eventfd_read(wake_, &value);
    }
    std::copy(events_.begin(), events_.end(), events);
    std::copy(trains_.begin(), trains_.end(), trains);
    std::memcpy(buffer, buffer_.data(), used_);
    *collected = {std::int32_t(events_.size()), std::int32_t(trains_.size()), receptions_,
                  datagrams_};
    events_.clear();
    trains_.clear();
    used_ = 0;
    told_ = urgent_ = false;
    if (crowded_) room_.notify_all();
  }

  int send_to_all(const void* data, std::size_t bytes, std::int64_t* sent) {
    int whole = 0;
    for (std::size_t duck = 0; duck < inlets_.size(); ++duck) {
      const ssize_t took = send(inlets_[duck].socket, data, bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
      sent[duck] = took < 0 ? 0 : took;
      whole += sent[duck] == static_cast<std::int64_t>(bytes);
    }
    return whole;
  }

 private:
  static constexpr int kReady = 64;

  static bool begun_only(const OpenAsk& ask) { return ask.begun && ask.owing; }

  static constexpr std::uint32_t kSockets = 1u << 16, kStop = ~0u;

  int watch(int descriptor, std::uint32_t name) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u32 = name;
    return epoll_ctl(epoll_, EPOLL_CTL_ADD, descriptor, &event) ? errno : 0;
  }

  void leave(Inlet& inlet) {
    if (inlet.on) epoll_ctl(epoll_, EPOLL_CTL_DEL, inlet.socket, nullptr);
    inlet.on = false;
  }

  std::vector<OpenAsk>::iterator find(std::uint32_t ticket) {
    return std::find_if(asks_.begin(), asks_.end(),
                        [ticket](const OpenAsk& ask) { return ask.ticket() == ticket; });
  }

  bool full() const {
    return events_.size() + kMessages > DUCK_MOST_EVENTS || trains_.size() == DUCK_MOST_TRAINS ||
           used_ + kTrain > DUCK_MOST_BYTES;
  }

  void run() {
    for (;;) {
      epoll_event ready[kReady];
      const int count = epoll_wait(epoll_, ready, kReady, restless_ ? kPauseMs : -1);
      for (int i = 0; i < count; ++i) {
        const std::lock_guard<std::mutex> held(lock_);
        handle(ready + i, 1);
      }
      std::unique_lock<std::mutex> held(lock_);
      if (stopping_) return;
      // A pause is told even if all before it was collected: something may be lost.
      const bool paused = restless_ && count == 0;
      if (!told_ && (urgent_ || paused || full())) {
        told_ = true;
        eventfd_write(wake_, 1);
      }
      if (count) restless_ = std::any_of(asks_.begin(), asks_.end(), begun_only);
      if (paused) restless_ = false;
      crowded_ = full();
      while (full() && !stopping_) room_.wait(held);
      crowded_ = false;
      if (stopping_) return;
    }
  }

  void handle(const epoll_event* ready, int count) {
    for (int i = 0; i < count && !full(); ++i) {
      const std::uint32_t name = ready[i].data.u32;
      if (name == kStop) continue;
      if (name >= kSockets)
        drain(sockets_[name - kSockets]);
      else if (inlets_[name].on)
        receive(int(name), inlets_[name]);
    }
  }

  // Tells what came. Most of it can wait for the round's end.
  void tell(const duck_event& event, bool urgent) {
    events_.push_back(event);
    urgent_ = urgent_ || urgent;
  }

  std::uint8_t judged(const OpenAsk& ask, const std::uint8_t* header, const std::uint8_t* body,
                      std::uint32_t crc) const {
    if (!check_) return DUCK_MESSAGE_GOOD;
    return duck_crc32c(duck_crc32c(0, header, kCrc), body, ask.bytes()) == crc
               ? DUCK_MESSAGE_GOOD
               : DUCK_MESSAGE_BAD;
  }

  // One reception of a connection.
  void receive(int duck, Inlet& inlet) {
    const auto number = static_cast<std::uint16_t>(duck);
    const auto ask = std::find_if(asks_.begin(), asks_.end(), [&](const OpenAsk& one) {
      return inlet.have ? one.ticket() == inlet.ticket : one.missing[duck] != 0;
    });
    if (ask == asks_.end()) {
      leave(inlet);
      tell({0, number, DUCK_EVENT_READABLE, 0, 0, now_s()}, true);
      return;
    }
    if (!inlet.have) {
      inlet.place = ask->body(duck) - kHeader;
      inlet.ticket = ask->ticket();
      inlet.size = kHeader + ask->bytes() + seal_;
    }
    const std::size_t room = std::min(inlet.size - inlet.have, kStretch);
    const ssize_t got = recv(inlet.socket, inlet.place + inlet.have, room, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) return;
    if (got <= 0) {
      const auto error = static_cast<std::uint8_t>(got < 0 ? errno : 0);
      leave(inlet);
      tell({inlet.ticket, number, DUCK_EVENT_ENDED, error, 0, now_s()}, true);
      return;
    }
    ++calls_[duck];
    inlet.have += std::size_t(got);
    if (inlet.have < kCrc) return;
    const auto header = ask->want(duck);
    if (std::memcmp(inlet.place, header.data(), kCrc) != 0) {
      leave(inlet);
      tell({inlet.ticket, number, DUCK_MESSAGE_OTHER, 0, 0, now_s()}, true);
      return;
    }
    if (inlet.have < inlet.size) return;
    const std::uint8_t what =
        judged(*ask, header.data(), inlet.place + kHeader, field<std::uint32_t>(inlet.place, kCrc));
    ask->came(duck, 1);
    inlet.have = 0;
    tell({inlet.ticket, number, what, 0, 1, now_s()}, what != DUCK_MESSAGE_GOOD || !ask->owing);
  }

  // The first fragments of a train that belong to one answer and are all fresh, or all doubled; how
  // many bytes they take, and their bits.
  std::size_t run_of(const std::uint8_t* train, std::size_t bytes, std::size_t size,
                     const OpenAsk& ask, int duck, std::uint64_t& bits) const {
    const auto header = ask.want(duck);
    const std::size_t fragments = ask.fragments(), message = ask.bytes();
    const auto first = field<std::uint16_t>(train, kFragment);
    const auto crc = field<std::uint32_t>(train, kCrc);
    std::size_t end = 0;
    bits = 0;
    for (std::size_t index = first; index < fragments && end < bytes; ++index) {
      const std::uint8_t* datagram = train + end;
      const std::size_t length = std::min(size, bytes - end);
      const std::size_t offset = index * payload_;
      if (length < kHeader || offset >= message ||
          std::memcmp(datagram, header.data(), kFragment) != 0 ||
          field<std::uint16_t>(datagram, kFragment) != index ||
          std::memcmp(datagram + kFragments, header.data() + kFragments, kOffset - kFragments) !=
              0 ||
          field<std::uint32_t>(datagram, kOffset) != offset ||
          field<std::uint32_t>(datagram, kCrc) != crc ||
          length - kHeader != std::min(payload_, message - offset))
        break;
      const std::uint64_t bit = std::uint64_t{1} << index;
      if (bits && !(bits & ask.missing[duck]) != !(bit & ask.missing[duck])) break;
      bits |= bit;
      end += length;
    }
    return end;
  }

  // Takes such a run from the front of a train; how many bytes it is.
  std::size_t take(const std::uint8_t* train, std::size_t bytes, std::size_t size, OpenAsk& ask,
                   int duck) {
    std::uint64_t bits = 0;
    const std::size_t end = run_of(train, bytes, size, ask, duck, bits);
    if (!end) return 0;
    const auto number = static_cast<std::uint16_t>(duck);
    if (!(bits & ask.missing[duck])) {
      tell({ask.ticket(), number, DUCK_EVENT_DOUBLED, 0, bits, now_s()}, false);
      return end;
    }
    std::uint8_t* const to = ask.body(duck);
    std::size_t offset = field<std::uint16_t>(train, kFragment) * payload_;
    for (std::size_t at = 0; at < end; at += size, offset += payload_)
      std::memcpy(to + offset, train + at + kHeader, std::min(size, end - at) - kHeader);
    ask.came(duck, bits);
    std::uint8_t what = DUCK_MESSAGE_NONE;
    // The last fragment came, and others did not: that is to be looked at.
    bool urgent = bits >> (ask.fragments() - 1) & 1;
    if (!ask.missing[duck]) {
      const auto header = ask.want(duck);
      what = judged(ask, header.data(), to, field<std::uint32_t>(train, kCrc));
      urgent = what != DUCK_MESSAGE_GOOD || !ask.owing;
    }
    // Datagrams that the kernel did not join: one event for neighbours.
    duck_event* last = events_.empty() ? nullptr : &events_.back();
    if (last && last->ticket == ask.ticket() && last->duck == duck &&
        last->what == DUCK_MESSAGE_NONE) {
      last->bits |= bits;
      last->what = what;
      last->at = now_s();
      urgent_ = urgent_ || urgent;
    } else {
      tell({ask.ticket(), number, what, 0, bits, now_s()}, urgent);
    }
    return end;
  }

  // Receives what a datagram socket has.
  void drain(int socket) {
    for (int calls = 0; calls < kMostCalls && !full(); ++calls) {
      std::uint8_t* const base = buffer_.data() + used_;
      const Reception came = receive_train(socket, base);
      if (came.got < 0) {
        if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EBADF || errno == ENOTSOCK) return;
        ++receptions_;  // an ICMP message about something sent before: it was lost, no more
        continue;
      }
      ++receptions_;
      const auto bytes = static_cast<std::size_t>(came.got);
      const std::size_t size = came.size;
      datagrams_ += bytes ? (bytes + size - 1) / size : 1;
      if (!bytes || came.cut) continue;
      const std::uint64_t from = std::uint64_t{came.address} << 16 | came.port;
      const std::size_t done = taken(base, bytes, size, from);
      if (done == bytes) continue;
      // The rest is for the caller.
      std::memmove(base, base + done, bytes - done);
      trains_.push_back({static_cast<std::uint32_t>(used_), static_cast<std::uint32_t>(bytes - done),
                         static_cast<std::uint32_t>(size), came.address, came.port});
      used_ += bytes - done;
      urgent_ = true;
    }
  }

  // How many bytes at the front of a train were answers to open asks.
  std::size_t taken(const std::uint8_t* train, std::size_t bytes, std::size_t size,
                    std::uint64_t from) {
    std::size_t done = 0;
    while (bytes - done > kHeader && events_.size() < DUCK_MOST_EVENTS) {
      const auto duck = field<std::uint16_t>(train + done, kSource);
      if (duck >= senders_.size() || senders_[duck] != from) break;
      const auto ask = find(field<std::uint32_t>(train + done, kTicket));
      const std::size_t more =
          ask == asks_.end() ? 0 : take(train + done, bytes - done, size, *ask, duck);
      if (!more) break;
      done += more;
    }
    return done;
  }

  std::mutex lock_;
  std::condition_variable room_;
  std::thread thread_;
  int epoll_ = -1, stop_ = -1, wake_ = -1;
  bool stopping_ = false;
  std::uint32_t* const calls_;  // receptions of every connection: signs of life
  const std::size_t payload_, seal_;
  const bool check_;
  std::vector<Inlet> inlets_;
  std::vector<int> sockets_;
  std::vector<std::uint64_t> senders_;  // of every duck: address << 16 | port
  std::vector<OpenAsk> asks_;           // in the order of sending
  std::vector<std::vector<std::uint64_t>> spare_;
  // What the caller has not collected.
  std::vector<duck_event> events_;
  std::vector<duck_train> trains_;
  std::vector<std::uint8_t> buffer_;
  std::size_t used_ = 0;
  std::uint64_t receptions_ = 0, datagrams_ = 0;
  bool urgent_ = false;   // some of it is
  bool told_ = false;     // the caller was woken for it
  bool crowded_ = false;  // the thread waits for room
  bool restless_ = false;  // the thread's own: it would notice a pause between answers
};

int duck_receiver_create(int ducks, std::size_t payload, int seal, int check, int threaded,
                         std::uint32_t* calls, duck_receiver** made) {
  auto* receiver = new (std::nothrow) duck_receiver(ducks, payload, seal, check, calls);
  if (!receiver) return ENOMEM;
  if (const int error = receiver->start(threaded)) {
    delete receiver;
    return error;
  }
  *made = receiver;
  return 0;
}

void duck_receiver_destroy(duck_receiver* receiver) { delete receiver; }

int duck_receiver_descriptor(const duck_receiver* receiver) { return receiver->descriptor(); }

int duck_receiver_connection(duck_receiver* receiver, int duck, int socket) {
  return receiver->connection(duck, socket);
}

int duck_receiver_datagrams(duck_receiver* receiver, int socket) {
  return receiver->datagrams(socket);
}

void duck_receiver_sender(duck_receiver* receiver, int duck, std::uint64_t address) {
  receiver->sender(duck, address);
}

void duck_receiver_open(duck_receiver* receiver, const void* front, void* place,
                        std::size_t stride) {
  receiver->open(front, place, stride);
}

int duck_receiver_forget(duck_receiver* receiver, std::uint32_t ticket, std::uint16_t* ducks) {
  return receiver->forget(ticket, ducks);
}

void duck_receiver_came(duck_receiver* receiver, std::uint32_t ticket, int duck) {
  receiver->came(ticket, duck);
}

int duck_receiver_wants(duck_receiver* receiver, std::uint32_t ticket, int duck) {
  return receiver->wants(ticket, duck);
}

void duck_receiver_again(duck_receiver* receiver, std::uint32_t ticket, int duck) {
  receiver->again(ticket, duck);
}

std::size_t duck_receiver_begun(duck_receiver* receiver, int duck, void* to, std::size_t room) {
  return receiver->begun(duck, to, room);
}

int duck_receiver_resume(duck_receiver* receiver, int duck) { return receiver->resume(duck); }

void duck_receiver_drop(duck_receiver* receiver, int duck) { receiver->drop(duck); }

void duck_receiver_collect(duck_receiver* receiver, duck_event* events, duck_train* trains,
                           void* buffer, duck_collected* collected) {
  receiver->collect(events, trains, buffer, collected);
}

int duck_receiver_send(duck_receiver* receiver, const void* data, std::size_t bytes,
                       std::int64_t* sent) {
  return receiver->send_to_all(data, bytes, sent);
}

#else  // the asyncio way serves elsewhere

int duck_receiver_create(int, std::size_t, int, int, int, std::uint32_t*, duck_receiver**) {
  return 1;
}
void duck_receiver_destroy(duck_receiver*) {}
int duck_receiver_descriptor(const duck_receiver*) { return -1; }
int duck_receiver_connection(duck_receiver*, int, int) { return 1; }
int duck_receiver_datagrams(duck_receiver*, int) { return 1; }
void duck_receiver_sender(duck_receiver*, int, std::uint64_t) {}
void duck_receiver_open(duck_receiver*, const void*, void*, std::size_t) {}
int duck_receiver_forget(duck_receiver*, std::uint32_t, std::uint16_t*) { return 0; }
void duck_receiver_came(duck_receiver*, std::uint32_t, int) {}
int duck_receiver_wants(duck_receiver*, std::uint32_t, int) { return 1; }
void duck_receiver_again(duck_receiver*, std::uint32_t, int) {}
std::size_t duck_receiver_begun(duck_receiver*, int, void*, std::size_t) { return 0; }
int duck_receiver_resume(duck_receiver*, int) { return 1; }
void duck_receiver_drop(duck_receiver*, int) {}
void duck_receiver_collect(duck_receiver*, duck_event*, duck_train*, void*,
                           duck_collected* collected) {
  *collected = {};
}
int duck_receiver_send(duck_receiver*, const void*, std::size_t, std::int64_t*) { return 0; }

#endif
