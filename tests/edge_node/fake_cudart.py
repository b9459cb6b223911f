"""A CUDA runtime whose device memory is the host's: the same C contract, carried out late."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

_INVALID_VALUE, _INVALID_PITCH, _ILLEGAL_ADDRESS = 1, 12, 700
_WORDS = {
    _INVALID_VALUE: ctypes.create_string_buffer(b"invalid argument"),
    _INVALID_PITCH: ctypes.create_string_buffer(b"invalid pitch argument"),
}
_DEVICE_TO_DEVICE = 3

_pointer, _size, _code = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


class DeviceArray:
    """What an OrtValue on the device is to the pools."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array

    def data_ptr(self) -> int:
        return self.array.ctypes.data


class FakeCudart:
    """The library as ctypes gives it: functions of C types.

    A copy is checked at once and done only when the device is synchronised, so that who forgets to wait sees old
    bytes. Whole rows must lie within what `zeros` has handed out. failing: the code that synchronising returns.
    """

    def __init__(self) -> None:
        self.failing = 0
        self.copies = 0
        self._allocated: list[DeviceArray] = []
        self._waiting: list[tuple[int, int, int]] = []
        self.cudaMemcpy2D = ctypes.CFUNCTYPE(_code, _pointer, _size, _pointer, _size, _size, _size, _code)(self._copy)
        self.cudaDeviceSynchronize = ctypes.CFUNCTYPE(_code)(self._synchronise)
        self.cudaGetErrorString = ctypes.CFUNCTYPE(_pointer, _code)(self._words)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        self._allocated.append(DeviceArray(np.zeros(shape, dtype)))
        return self._allocated[-1]

    def _copy(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int, kind: int
    ) -> int:
        if kind != _DEVICE_TO_DEVICE:
            return _INVALID_VALUE
        if width > min(target_pitch, source_pitch):
            return _INVALID_PITCH
        for row in range(rows):
            here, there = source + row * source_pitch, target + row * target_pitch
            if not (self._holds(here, width) and self._holds(there, width)):
                return _ILLEGAL_ADDRESS
            self._waiting.append((there, here, width))
        self.copies += 1
        return 0

    def _synchronise(self) -> int:
        for there, here, width in self._waiting:
            ctypes.memmove(there, here, width)
        self._waiting.clear()
        return self.failing

    def _words(self, code: int) -> int | None:
        return ctypes.addressof(_WORDS[code]) if code in _WORDS else None

    def _holds(self, address: int, width: int) -> bool:
        return any(
            one.data_ptr() <= address and address + width <= one.data_ptr() + one.array.nbytes
            for one in self._allocated
        )
