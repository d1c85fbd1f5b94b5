"""EGL's devices: run as a script, it prints one JSON list.

In a separate process, because a driver library stays loaded, and because drivers differ in whether
`CUDA_VISIBLE_DEVICES` renumbers what they report: here it is unset.
"""

import ctypes
import json
import sys

_EXTENSIONS = 0x3055  # EGL_EXTENSIONS
_CUDA_DEVICE = 0x323A  # EGL_CUDA_DEVICE_NV, of the extension EGL_NV_device_cuda
_MOST = 64


def query() -> list[dict[str, int | bool | None]]:
    """The devices in EGL's order: `cuda`, the CUDA number or none, and `software`. Empty without EGL."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return []
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    found = {}
    for name, result, arguments in (
        ("eglQueryDevicesEXT", ctypes.c_uint, [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]),
        ("eglQueryDeviceStringEXT", ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_int]),
        ("eglQueryDeviceAttribEXT", ctypes.c_uint, [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]),
    ):
        address = egl.eglGetProcAddress(name.encode())
        if not address:
            return []
        found[name] = ctypes.CFUNCTYPE(result, *arguments)(address)
    handles, count = (ctypes.c_void_p * _MOST)(), ctypes.c_int(0)
    if not found["eglQueryDevicesEXT"](_MOST, handles, ctypes.byref(count)):
        return []
    devices: list[dict[str, int | bool | None]] = []
    for handle in handles[: count.value]:
        extensions = (found["eglQueryDeviceStringEXT"](handle, _EXTENSIONS) or b"").decode().split()
        number = ctypes.c_ssize_t(-1)
        known = "EGL_NV_device_cuda" in extensions and found["eglQueryDeviceAttribEXT"](
            handle, _CUDA_DEVICE, ctypes.byref(number)
        )
        devices.append({"cuda": number.value if known else None, "software": "EGL_MESA_device_software" in extensions})
    return devices


if __name__ == "__main__":
    json.dump(query(), sys.stdout)
