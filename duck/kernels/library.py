"""The native library as Python sees it: loaded once, every function with its C types.

What the functions mean is said in `native/duck.h`. Calls release the GIL but those of `swift`.
"""

from __future__ import annotations

import ctypes
from ctypes import (
    c_char_p,
    c_float,
    c_int,
    c_size_t,
    c_ssize_t,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from duck.kernels.build import find_library

OK, BAD_SHAPE, NO_MEMORY, NO_ISA, NOT_A_NUMBER, BAD_ID, TWICE, NOT_LOADED = range(8)
"""Status codes of duck.h."""
MESSAGE_NONE, MESSAGE_GOOD, MESSAGE_BAD, MESSAGE_OTHER = range(4)
"""States of duck.h's messages."""
EVENT_ENDED, EVENT_READABLE, EVENT_DOUBLED = 4, 5, 6
"""What else its events are."""
SWIFT_BYTES = 1 << 16
"""What passes over at most so many bytes takes microseconds: see `swift`."""
_SWIFT_SUMS = 1 << 15  # the same for sums of many rows

# gate, up and down, each with the distance of its rows; then their scales
_SLICE = [c_void_p, c_ssize_t] * 3 + [c_void_p] * 3
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "duck_isa": (c_char_p, [c_char_p]),
    "duck_pool_create": (c_void_p, [c_int] * 3),
    "duck_pool_threads": (c_int, [c_void_p]),
    "duck_pool_destroy": (None, [c_void_p]),
    "duck_record_bytes": (c_size_t, [c_int] * 3),
    "duck_scale_floats": (c_size_t, [c_int] * 3),
    "duck_pack": (c_int, [*[c_int] * 4, *_SLICE, c_void_p, c_void_p]),
    "duck_experts_create": (c_int, [*[c_int] * 5, c_char_p, ctypes.POINTER(c_void_p)]),
    "duck_experts_use": (c_int, [c_void_p, c_char_p]),
    "duck_experts_destroy": (None, [c_void_p]),
    "duck_experts_bytes": (c_size_t, [c_void_p]),
    "duck_experts_load": (c_int, [c_void_p, c_int, c_int, c_int, *_SLICE]),
    "duck_experts_records": (ctypes.POINTER(ctypes.c_uint8), [c_void_p, c_int]),
    "duck_experts_scales": (ctypes.POINTER(c_float), [c_void_p, c_int]),
    "duck_experts_adopt": (c_int, [c_void_p, c_int, c_int, c_int]),
    "duck_experts_forward": (
        c_int,
        [c_void_p, c_void_p, c_int, c_int, c_int, *[c_void_p] * 4, ctypes.POINTER(c_int)],
    ),
    "duck_experts_read": (c_uint64, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "duck_atomic_add_u32": (c_uint32, [c_void_p, c_uint32]),
    "duck_crc32c": (c_uint32, [c_uint32, c_void_p, c_size_t]),
    "duck_message_put": (None, [c_void_p, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t]),
    "duck_messages_get": (
        c_int,
        [c_void_p, c_size_t, c_int, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p],
    ),
    "duck_slot_ask": (None, [c_void_p, c_uint32, c_uint16, c_uint32, c_void_p, c_size_t]),
    "duck_slot_take": (c_int, [c_void_p]),
    "duck_slot_look": (c_int, [c_void_p]),
    "duck_slot_sum": (c_int, [c_void_p, c_int, c_void_p, c_void_p]),
    "duck_bf16_from_f32": (None, [c_void_p, c_void_p, c_size_t]),
    "duck_f32_from_bf16": (None, [c_void_p, c_void_p, c_size_t]),
    "duck_rows_sum": (c_int, [c_void_p, c_size_t, c_int, c_size_t, c_int, c_void_p]),
    "duck_receiver_create": (
        c_int,
        [c_int, c_size_t, c_int, c_int, c_int, c_void_p, ctypes.POINTER(c_void_p)],
    ),
    "duck_receiver_destroy": (None, [c_void_p]),
    "duck_receiver_descriptor": (c_int, [c_void_p]),
    "duck_receiver_connection": (c_int, [c_void_p, c_int, c_int]),
    "duck_receiver_datagrams": (c_int, [c_void_p, c_int]),
    "duck_receiver_sender": (None, [c_void_p, c_int, c_uint64]),
    "duck_receiver_open": (None, [c_void_p, c_void_p, c_void_p, c_size_t]),
    "duck_receiver_forget": (c_int, [c_void_p, c_uint32, c_void_p]),
    "duck_receiver_came": (None, [c_void_p, c_uint32, c_int]),
    "duck_receiver_wants": (c_int, [c_void_p, c_uint32, c_int]),
    "duck_receiver_again": (None, [c_void_p, c_uint32, c_int]),
    "duck_receiver_begun": (c_size_t, [c_void_p, c_int, c_void_p, c_size_t]),
    "duck_receiver_resume": (c_int, [c_void_p, c_int]),
    "duck_receiver_drop": (None, [c_void_p, c_int]),
    "duck_receiver_collect": (None, [c_void_p] * 5),
    "duck_receiver_send": (c_int, [c_void_p, c_void_p, c_size_t, c_void_p]),
    "duck_echo_memory": (None, [c_void_p, c_void_p, *[c_int] * 5]),
    "duck_echo_stream": (None, [c_void_p, c_int, c_size_t]),
    "duck_echo_datagrams": (
        None,
        [c_void_p, c_int, c_int, c_uint32, c_uint16, c_size_t, *[c_void_p] * 4],
    ),
}


@cache
def native() -> ctypes.CDLL:
    """The library, compiled first if need be.

    Raises:
        ConfigError: it is not there and cannot be compiled.
    """
    library = ctypes.CDLL(str(find_library()))
    _declare(library)
    return library


@cache
def swift() -> ctypes.PyDLL:
    """The same library for calls of a few microseconds: they keep the GIL.

    Giving it up costs more than such a call takes, and a thread that wants it back waits for the
    others' turn.

    Raises:
        ConfigError: as `native`.
    """
    library = ctypes.PyDLL(native()._name)
    _declare(library)
    return library


def _declare(library: ctypes.CDLL) -> None:
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def is_loaded() -> bool:
    """Whether `native` has been called: what comes now compiles nothing."""
    return bool(native.cache_info().currsize)


def crc32c(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """CRC-32C (Castagnoli) of what gave `crc`, followed by `data` (contiguous)."""
    size = len(data) if isinstance(data, bytes) else memoryview(data).nbytes
    library = swift() if size <= SWIFT_BYTES else native()
    value: int = library.duck_crc32c(crc, address_of(data), size)
    return value


def address_of(data: bytes | bytearray | memoryview) -> Any:
    """Where contiguous memory lies, as a pointer argument; the caller keeps `data` alive."""
    if isinstance(data, bytes):
        return data
    view = memoryview(data)
    if not view.nbytes:
        return None
    if view.readonly:
        return np.frombuffer(view, np.uint8).ctypes.data
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def atomic_add_u32(address: int, value: int) -> int:
    """Add to a word, in one step for all processes that share it; returns what was there.

    address: a multiple of 4; value: modulo 2^32.
    """
    before: int = swift().duck_atomic_add_u32(address, value & 0xFFFFFFFF)
    return before


def bf16_from_f32(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Rounded to nearest, ties to even; NaN stays NaN."""
    source = np.ascontiguousarray(values, np.float32)
    result = np.empty(source.shape, np.uint16)
    library = swift() if source.nbytes <= SWIFT_BYTES else native()
    library.duck_bf16_from_f32(source.ctypes.data, result.ctypes.data, source.size)
    return result


def sum_rows(rows: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float32], bool]:
    """The sum over the first axis in its order, in float32; and whether it is finite.

    rows: float32, or uint16 holding bfloat16; each of rows[i] is contiguous.
    """
    first, kind = rows[0], rows.dtype.char
    assert kind in "Hf"
    assert first.flags.c_contiguous
    total = np.empty(first.shape, np.float32)
    size = total.size
    library = swift() if size <= _SWIFT_SUMS else native()
    finite = library.duck_rows_sum(
        place_of(first), rows.strides[0], len(rows), size, kind == "H", place_of(total)
    )
    return total, bool(finite)


def place_of(array: npt.NDArray[Any]) -> int:
    """Where a contiguous array lies; sooner than numpy says it, if it may be written to."""
    if array.flags.writeable:
        return ctypes.addressof(ctypes.c_char.from_buffer(array.data))
    address: int = array.ctypes.data
    return address


def f32_from_bf16(codes: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Exact."""
    source = np.ascontiguousarray(codes, np.uint16)
    result = np.empty(source.shape, np.float32)
    library = swift() if result.nbytes <= SWIFT_BYTES else native()
    library.duck_f32_from_bf16(source.ctypes.data, result.ctypes.data, source.size)
    return result
