// The C interface of the expert kernel: everything that Python calls, and nothing else.
//
// Functions return DUCK_OK or one of the codes below; none throws, and none writes outside the
// arrays it is given, whatever the ids are. Pointers to arrays must be valid for the sizes that
// the arguments imply: that is the one thing the kernel cannot check.
#pragma once

#include <cstddef>
#include <cstdint>

#define DUCK_API extern "C" __attribute__((visibility("default")))

enum duck_status : int {
  DUCK_OK = 0,
  DUCK_BAD_SHAPE = 1,     // a size, a format or an index that makes no sense
  DUCK_NO_MEMORY = 2,
  DUCK_NO_ISA = 3,        // not on this processor, or no such name
  DUCK_NOT_A_NUMBER = 4,  // a weight or a scale that is NaN or infinite
  DUCK_BAD_ID = 5,        // an expert id that is neither -1 nor below the number of experts
  DUCK_TWICE = 6,         // one row names an expert twice
  DUCK_NOT_LOADED = 7,    // an expert that was never packed
};

struct duck_pool;
struct duck_experts;

// The instruction set that would be used: `wanted` if this processor has it, the best one if
// `wanted` is null; null if there is none of that name.
DUCK_API const char* duck_isa(const char* wanted);

// threads < 1: one for each processor this process may use. The thread that calls forward is one
// of them. spin_us: how long a thread without work stays awake. pin: one processor a thread.
DUCK_API duck_pool* duck_pool_create(int threads, int spin_us, int pin);
DUCK_API int duck_pool_threads(const duck_pool* pool);
DUCK_API void duck_pool_destroy(duck_pool* pool);

// What one expert takes: bytes of its record, and floats of its scales.
// format: 0 fp8 e4m3 with 128 x 128 scales, 1 bf16, 2 f32, and two that lose something (dots.h):
// 3 int8, 4 int4.
DUCK_API std::size_t duck_record_bytes(int hidden, int columns, int format);
DUCK_API std::size_t duck_scale_floats(int hidden, int columns, int format);

DUCK_API int duck_experts_create(int layers, int experts, int hidden, int columns, int format,
                                 const char* isa, duck_experts** out);
DUCK_API int duck_experts_use(duck_experts* experts, const char* isa);  // from now on
DUCK_API void duck_experts_destroy(duck_experts* experts);
DUCK_API std::size_t duck_experts_bytes(const duck_experts* experts);  // arena and scales

// One expert's slice into its resident form, in memory of the caller's: duck_record_bytes and
// duck_scale_floats. gate and up are [columns, hidden], down [hidden, columns], rows apart by the
// given number of weights; int8 and int4 are made from floats. `start`: the slice's first column in the whole intermediate dimension;
// it decides where scale blocks begin. Scales (fp8 only): gate and up [blocks of columns,
// ceil(hidden/128)], down [ceil(hidden/128), blocks of columns], contiguous, where the blocks of
// columns are those the slice touches: start/128 .. (start+columns-1)/128.
DUCK_API int duck_pack(int hidden, int columns, int format, int start,
                       const void* gate, std::ptrdiff_t gate_stride,
                       const void* up, std::ptrdiff_t up_stride,
                       const void* down, std::ptrdiff_t down_stride,
                       const float* gate_scale, const float* up_scale, const float* down_scale,
                       std::uint8_t* record, float* scales);

// Packs an expert where it belongs. Different experts may be loaded at the same time, but not while
// forward uses them.
DUCK_API int duck_experts_load(duck_experts* experts, int layer, int expert, int start,
                               const void* gate, std::ptrdiff_t gate_stride,
                               const void* up, std::ptrdiff_t up_stride,
                               const void* down, std::ptrdiff_t down_stride,
                               const float* gate_scale, const float* up_scale,
                               const float* down_scale);

// The same for packed bytes from elsewhere: written to where a layer's experts lie one after the
// other, records and scales, and then adopted one by one. Adopting checks that they are numbers,
// and may move some weights out of the record (resident.h): it happens once.
DUCK_API std::uint8_t* duck_experts_records(duck_experts* experts, int layer);
DUCK_API float* duck_experts_scales(duck_experts* experts, int layer);
DUCK_API int duck_experts_adopt(duck_experts* experts, int layer, int expert, int start);

// out[t] = sum over the experts e of row t, in ascending order of e, of
//     down_e (silu(gate_e x[t]) * (up_e x[t]) * weight[t, e]),
// all float32, row-major. ids: -1 for "no expert here". A row whose input or result is not finite
// comes out as NaN. On an error out is untouched and *bad_row says which row was at fault.
DUCK_API int duck_experts_forward(duck_experts* experts, duck_pool* pool, int layer, int rows,
                                  int top_k, const float* x, const std::int32_t* ids,
                                  const float* weights, float* out, int* bad_row);

// Reads bytes of the arena once, from `offset`, with all threads, by the fastest instructions there
// are, whatever `forward` uses: the bandwidth to compare with.
DUCK_API std::uint64_t duck_experts_read(duck_experts* experts, duck_pool* pool,
                                         std::size_t offset, std::size_t bytes);

// What transports need and Python lacks: an atomic counter in shared memory (returns the value
// before), a checksum (of the bytes that gave `crc`, followed by these), and bf16 rows (rounding
// to nearest even; NaN stays NaN).
DUCK_API std::uint32_t duck_atomic_add_u32(void* address, std::uint32_t value);
DUCK_API std::uint32_t duck_crc32c(std::uint32_t crc, const void* data, std::size_t bytes);
DUCK_API void duck_bf16_from_f32(const float* from, std::uint16_t* to, std::size_t count);
DUCK_API void duck_f32_from_bf16(const std::uint16_t* from, float* to, std::size_t count);

// to[i] = the rows' sum at i, added in their order, as floats. Rows of `count` bf16 numbers (if
// `bf16`) or floats lie `stride` bytes apart. Returns whether every sum is finite.
DUCK_API int duck_rows_sum(const void* rows, std::size_t stride, int ducks, std::size_t count,
                           int bf16, float* to);

// Messages in memory that processes share (messages.cpp): a header of 32 bytes, whose last four are
// the checksum of all else, then the body. Places are aligned to 8 bytes.
//
// Puts one there, its body in two parts; `header` is 28 bytes.
DUCK_API void duck_message_put(void* place, const void* header, const void* first,
                               std::size_t first_bytes, const void* second,
                               std::size_t second_bytes);

enum duck_message : std::uint8_t {
  DUCK_MESSAGE_NONE = 0,   // no message with this ticket yet
  DUCK_MESSAGE_GOOD = 1,   // copied, and its checksum is right
  DUCK_MESSAGE_BAD = 2,    // copied, and its checksum is wrong
  DUCK_MESSAGE_OTHER = 3,  // the ticket is right and another field of the header is not; not copied
};

// Copies the bodies of the messages that lie `stride` apart into rows that lie `row_stride` apart:
// those whose state is NONE and whose header is `want` (28 bytes; the source of the one at index i
// is larger by i). Updates `states`; returns how many are not NONE any more.
DUCK_API int duck_messages_get(const void* places, std::size_t stride, int count, const void* want,
                               std::size_t bytes, void* rows, std::size_t row_stride,
                               std::uint8_t* states);

// What a host has of a place in shared memory for an ask and every duck's answer to it.
struct duck_slot {
  std::uint64_t ticket, count;      // std::uint32_t*: which ask it serves, how many have answered
  std::uint64_t ask;                // where the ask's message goes
  std::uint64_t answers, stride;    // duck 0's message, and the distance from one duck's to the next
  std::uint64_t rows, row_stride;   // where the answers' bodies are copied to
  std::uint64_t states;             // duck_message[ducks], of the ask in flight
  std::uint32_t ducks;
  std::int32_t wake;                // the eventfd that wakes the ducks
  std::uint8_t want[28];            // the header of duck 0's answer, up to the checksum
  std::uint32_t bytes;              // of an answer's body
};

// Puts an ask there and wakes the ducks. `bytes`: of each answer's body; the other fields of `want`
// must be right.
DUCK_API void duck_slot_ask(duck_slot* slot, std::uint32_t ticket, std::uint16_t layer,
                            std::uint32_t bytes, const void* body, std::size_t body_bytes);

// Takes the answers that are there (duck_messages_get). Returns how many have been taken since the
// ask was put; -1 when one of them is not GOOD.
DUCK_API int duck_slot_take(duck_slot* slot);

// Looks at the headers of the answers that are there, and copies their stamps alone; the same else:
// GOOD says then that the header is the one wanted. Checksums are looked at by `take`, once the
// states are NONE again, or by `sum`; the stamps' too.
DUCK_API int duck_slot_look(duck_slot* slot);

// The sum of all answers' rows in the order of the ducks, each answer copied, checked and added in
// one pass; (bytes of the rows / of a number,) floats. Returns whether it is finite. bad: the first
// duck whose answer fails its checksum (nothing of `to` may be used then), or -1.
DUCK_API int duck_slot_sum(const duck_slot* slot, int bf16, float* to, int* bad);

// Answers that come through sockets (receive.cpp), straight into the rows of the asks that wait for
// them; what does not fit an open ask is left to the caller. A receiver has a thread of its own, or
// works when it is asked to. Functions that return int return 0 or errno unless said otherwise, and
// none of them waits for anything but the thread's current reception.
struct duck_receiver;

// What came.
struct duck_event {
  std::uint32_t ticket;
  std::uint16_t duck;
  std::uint8_t what;  // duck_message, or one of the following
  std::uint8_t error;
  std::uint64_t bits;  // the fragments
  double at;           // seconds of CLOCK_MONOTONIC
};

// NONE: fragments, others are missing. BAD and OTHER as in shared memory; OTHER, ENDED and READABLE:
// nothing more is received from this connection until `resume`.
enum duck_event_what : std::uint8_t {
  DUCK_EVENT_ENDED = 4,     // the connection is closed, or lost by `error`
  DUCK_EVENT_READABLE = 5,  // there is something that no ask waits for; nothing was received
  DUCK_EVENT_DOUBLED = 6,   // fragments that had come before; dropped
};

// Datagrams for the caller: one behind the other, `size` bytes long but the last, at `offset` in the
// buffer.
struct duck_train {
  std::uint32_t offset, bytes, size;
  std::uint32_t address, port;  // of the sender
};

struct duck_collected {
  std::int32_t events, trains;
  std::uint64_t receptions, datagrams;  // of all datagram sockets, so far
};

// The room that `collect` wants.
enum { DUCK_MOST_EVENTS = 512, DUCK_MOST_TRAINS = 256, DUCK_MOST_BYTES = 1 << 19 };

// payload: bytes of every fragment of a datagram but an answer's last. seal: bytes that follow a
// body in a stream. check: messages have a CRC-32C, to be looked at. calls: (ducks,) counts the
// receptions of every connection, modulo 2^32.
DUCK_API int duck_receiver_create(int ducks, std::size_t payload, int seal, int check,
                                  int threaded, std::uint32_t* calls, duck_receiver** made);
DUCK_API void duck_receiver_destroy(duck_receiver* receiver);
// Readable when there is something to collect.
DUCK_API int duck_receiver_descriptor(const duck_receiver* receiver);
// Receive from a duck's connection, which is between two frames; a duplicate of it is made.
DUCK_API int duck_receiver_connection(duck_receiver* receiver, int duck, int socket);
// Receive from a datagram socket, which stays open until `destroy`; and where a duck's datagrams come
// from: address << 16 | port.
DUCK_API int duck_receiver_datagrams(duck_receiver* receiver, int socket);
DUCK_API void duck_receiver_sender(duck_receiver* receiver, int duck, std::uint64_t address);
// An ask is sent. front: the header of duck 0's answer, up to the checksum; 1 to 64 fragments.
// place: where its body goes, the others' a stride apart; room for a header lies before each.
DUCK_API void duck_receiver_open(duck_receiver* receiver, const void* front, void* place,
                                 std::size_t stride);
// An ask is over: nothing is written for it any more. ducks: those whose answers have come in part;
// `begun` gives the parts while the memory is still there. Returns how many.
DUCK_API int duck_receiver_forget(duck_receiver* receiver, std::uint32_t ticket,
                                  std::uint16_t* ducks);
// The caller has this answer; or wants it once more. Whether it is still wanted: 0 when it lies in its
// place already; 1 too for asks that are not open here.
DUCK_API void duck_receiver_came(duck_receiver* receiver, std::uint32_t ticket, int duck);
DUCK_API int duck_receiver_wants(duck_receiver* receiver, std::uint32_t ticket, int duck);
DUCK_API void duck_receiver_again(duck_receiver* receiver, std::uint32_t ticket, int duck);
// Hands over the frame that was begun, and leaves the connection alone until `resume`. Returns its
// bytes; when there is no room for so many, nothing was done.
DUCK_API std::size_t duck_receiver_begun(duck_receiver* receiver, int duck, void* to,
                                         std::size_t room);
DUCK_API int duck_receiver_resume(duck_receiver* receiver, int duck);
// The connection is over.
DUCK_API void duck_receiver_drop(duck_receiver* receiver, int duck);
// Receives what is there, and gives all that has come since the last time, events first.
DUCK_API void duck_receiver_collect(duck_receiver* receiver, duck_event* events,
                                    duck_train* trains, void* buffer,
                                    duck_collected* collected);
// Sends the same bytes by all connections; sent[i]: how many the system took of connection i, 0 too
// when it refused. Returns how many connections took all.
DUCK_API int duck_receiver_send(duck_receiver* receiver, const void* data, std::size_t bytes,
                                std::int64_t* sent);

// Ducks that compute nothing and answer at once, for the bench of transports (echo.cpp). Each of
// these waits for asks and answers them until it is over, or the other end has gone.
struct duck_echo {
  std::uint64_t message;    // of the largest answer: stamps and rows; others are its beginning
  std::uint64_t over;       // std::uint32_t*: not 0 any more: it is over
  std::uint64_t sealed;     // with a key: sealed answers instead, of tickets 1, 2, ..., tickets
  std::uint32_t sealed_bytes, tickets;
  std::uint32_t most;       // bytes of the message
  std::uint32_t ask_row, answer_row;  // bytes of one row
  std::uint32_t session;
  std::uint16_t source;     // the duck
  std::uint16_t unused[3];
};

// A duck's places in one slot of the shared memory.
struct duck_echo_slot {
  std::uint64_t ticket, count, ask, answer;
  std::uint32_t ask_bytes;  // room
  std::uint32_t swift;      // only the last duck signals
  std::uint32_t seen;       // the last ticket
  std::uint32_t unused;
};

// epoll: readable when there may be asks. next, host: eventfds of the ducks that this one wakes (-1:
// none), and of the host.
DUCK_API void duck_echo_memory(const duck_echo* echo, duck_echo_slot* slots, int count, int ducks,
                               int epoll, int next, int host);
// A blocking connection, on which nothing but asks comes that has a body; most: bytes of an ask's
// frames.
DUCK_API void duck_echo_stream(const duck_echo* echo, int socket, std::size_t most);
// An ask that was answered; a ring of the last DUCK_ECHO_ANSWERED can be read at any time. And how many
// trains are handed over, and how many asks were answered in all.
struct duck_echo_answered {
  std::uint32_t ticket, bytes;
  std::uint16_t layer, unused16;
  std::uint32_t unused;
  double resent_at;
};
struct duck_echo_came {
  std::uint32_t trains, answered;
  std::uint8_t header[32];  // of the ask that is coming, and the fragments of it that have come
  std::uint64_t bits;
};
enum { DUCK_ECHO_TRAINS = 64, DUCK_ECHO_ANSWERED = 2, DUCK_ECHO_BYTES = 1 << 18 };
// Answers asks whose datagrams come to the group's socket or the duck's `own`, from which
// answers go to the host's address and port, `payload` bytes a datagram; and sends the last ones again,
// or what a NACK says is missing of them, when the host asks. Returns with all other trains, one behind
// the other in `room` (DUCK_ECHO_BYTES), or when it is over: what is missing of an ask is told there.
DUCK_API void duck_echo_datagrams(const duck_echo* echo, int asks, int own,
                                  std::uint32_t address, std::uint16_t port, std::size_t payload,
                                  void* room, duck_train* trains, duck_echo_answered* answered,
                                  duck_echo_came* came);
