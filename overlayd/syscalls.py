# SPDX-License-Identifier: LGPL-2.1-or-later
"""One function per system call, under the call's own name.

Nothing here knows what an overlay is.  Each function raises :class:`OSError` with the call's name
as its ``filename``; meaning is given one level up.  Constants are those of the kernel's uapi
headers.  Numbers above 423 are the same on every architecture.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os

TYPE_CHECKING = False  # see overlayd.entrance
if TYPE_CHECKING:
    from typing import Final

AT_FDCWD: Final = -100
AT_SYMLINK_NOFOLLOW: Final = 0x100
AT_NO_AUTOMOUNT: Final = 0x800
AT_EMPTY_PATH: Final = 0x1000

RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08

OPEN_TREE_CLONE: Final = 1
OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC

MOVE_MOUNT_F_EMPTY_PATH: Final = 0x04
MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40
MOVE_MOUNT_BENEATH: Final = 0x200

FSOPEN_CLOEXEC: Final = 1
FSPICK_CLOEXEC: Final = 1
FSPICK_EMPTY_PATH: Final = 8
FSMOUNT_CLOEXEC: Final = 1
FSCONFIG_SET_FLAG: Final = 0
FSCONFIG_SET_STRING: Final = 1
FSCONFIG_SET_FD: Final = 5
FSCONFIG_CMD_CREATE: Final = 6
FSCONFIG_CMD_RECONFIGURE: Final = 7

MOUNT_ATTR_RDONLY: Final = 0x01
MOUNT_ATTR_NOSUID: Final = 0x02
MOUNT_ATTR_NODEV: Final = 0x04
MOUNT_ATTR_NOEXEC: Final = 0x08

MS_BIND: Final = 1 << 12
MS_REC: Final = 1 << 14
MS_PRIVATE: Final = 1 << 18
MS_SLAVE: Final = 1 << 19
MS_SHARED: Final = 1 << 20

MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUSER: Final = 0x10000000
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAPBSET_DROP: Final = 24

STATX_TYPE: Final = 0x01
STATX_MNT_ID: Final = 0x1000
STATX_MNT_ID_UNIQUE: Final = 0x4000
STATX_ATTR_MOUNT_ROOT: Final = 0x2000

LSMT_ROOT: Final = 0xFFFFFFFFFFFFFFFF
STATMOUNT_SB_BASIC: Final = 0x01

NS_MNT_GET_NEXT: Final = 0x8010B70B
NS_MNT_GET_PREV: Final = 0x8010B70C

OVERLAYFS_SUPER_MAGIC: Final = 0x794C7630
TMPFS_MAGIC: Final = 0x01021994

_NR_OPEN_TREE: Final = 428
_NR_MOVE_MOUNT: Final = 429
_NR_FSOPEN: Final = 430
_NR_FSCONFIG: Final = 431
_NR_FSMOUNT: Final = 432
_NR_FSPICK: Final = 433
_NR_OPENAT2: Final = 437
_NR_MOUNT_SETATTR: Final = 442
_NR_STATMOUNT: Final = 457
_NR_LISTMOUNT: Final = 458

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


class _MntIdReq(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("spare", ctypes.c_uint32),
        ("mnt_id", ctypes.c_uint64),
        ("param", ctypes.c_uint64),
        ("mnt_ns_id", ctypes.c_uint64),  # Linux 6.11
    )


_MNT_ID_REQ_SIZE_VER0: Final = 24


class _Statmount(ctypes.Structure):
    # struct statmount is 512 bytes; only the field read here has a name.
    _fields_ = (
        ("_to_sb_magic", ctypes.c_uint8 * 24),
        ("sb_magic", ctypes.c_uint64),
        ("_rest", ctypes.c_uint8 * 480),
    )


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


class _Statx(ctypes.Structure):
    # struct statx is 256 bytes; only the fields read here have names.
    _fields_ = (
        ("mask", ctypes.c_uint32),
        ("blksize", ctypes.c_uint32),
        ("attributes", ctypes.c_uint64),
        ("_to_attributes_mask", ctypes.c_uint8 * 40),
        ("attributes_mask", ctypes.c_uint64),
        ("_to_mnt_id", ctypes.c_uint8 * 80),
        ("mnt_id", ctypes.c_uint64),
        ("_rest", ctypes.c_uint8 * 104),
    )


class _Statfs(ctypes.Structure):
    # struct statfs of the 64-bit kernels.
    _fields_ = (
        ("type", ctypes.c_long),
        ("bsize", ctypes.c_long),
        ("blocks", ctypes.c_uint64),
        ("bfree", ctypes.c_uint64),
        ("bavail", ctypes.c_uint64),
        ("files", ctypes.c_uint64),
        ("ffree", ctypes.c_uint64),
        ("fsid", ctypes.c_uint64),
        ("_rest", ctypes.c_long * 16),
    )


class StatxResult:
    """What :func:`statx` is asked for here."""

    __slots__ = ("mnt_id", "mount_root")

    def __init__(self, mnt_id: int, *, mount_root: bool) -> None:
        """Keep both."""
        self.mnt_id = mnt_id
        self.mount_root = mount_root


class StatfsResult:
    """Part of ``struct statfs``; sizes in bytes, ``files`` and ``ffree`` in inodes."""

    __slots__ = ("ffree", "files", "free", "fsid", "size", "type")

    def __init__(self, buffer: _Statfs) -> None:
        """Take what the kernel filled in."""
        self.type: int = buffer.type & 0xFFFFFFFF
        self.fsid: int = buffer.fsid
        self.size: int = buffer.blocks * buffer.bsize
        self.free: int = buffer.bfree * buffer.bsize
        self.files: int = buffer.files
        self.ffree: int = buffer.ffree


def _fail(name: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), name)


def _call(name: str, number: int, *args: object) -> int:
    result: int = _syscall(ctypes.c_long(number), *args)
    if result < 0:
        raise _fail(name)
    return result


def openat2(dirfd: int, path: str, flags: int, resolve: int) -> int:
    """Open *path* at *dirfd* under the RESOLVE_* rules; O_CLOEXEC is always added."""
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    return _call(
        "openat2",
        _NR_OPENAT2,
        ctypes.c_int(dirfd),
        ctypes.c_char_p(os.fsencode(path)),
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )


def open_tree(dirfd: int, path: str, flags: int) -> int:
    """Return an O_PATH fd of a mount, with OPEN_TREE_CLONE of a detached copy of it."""
    return _call(
        "open_tree",
        _NR_OPEN_TREE,
        ctypes.c_int(dirfd),
        ctypes.c_char_p(os.fsencode(path)),
        ctypes.c_uint(flags | OPEN_TREE_CLOEXEC),
    )


def move_mount(from_fd: int, to_fd: int, flags: int = 0) -> None:
    """Attach the mount *from_fd* at the place that *to_fd* is open on."""
    _call(
        "move_mount",
        _NR_MOVE_MOUNT,
        ctypes.c_int(from_fd),
        ctypes.c_char_p(b""),
        ctypes.c_int(to_fd),
        ctypes.c_char_p(b""),
        ctypes.c_uint(flags | MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH),
    )


def fsopen(fstype: str) -> int:
    """Open a new filesystem context."""
    return _call(
        "fsopen", _NR_FSOPEN, ctypes.c_char_p(fstype.encode()), ctypes.c_uint(FSOPEN_CLOEXEC)
    )


def fspick(fd: int) -> int:
    """Open the filesystem context of the mount *fd* is the root of, to reconfigure it."""
    return _call(
        "fspick",
        _NR_FSPICK,
        ctypes.c_int(fd),
        ctypes.c_char_p(b""),
        ctypes.c_uint(FSPICK_CLOEXEC | FSPICK_EMPTY_PATH),
    )


def fsconfig(fd: int, command: int, key: str | None = None, value: str | None = None) -> None:
    """Set one option of the context *fd*, or create or reconfigure its filesystem.

    The kernel's message log of the context is put into the error, where there is one.
    """
    _fsconfig(fd, command, key, value, 0)


def fsconfig_fd(fd: int, key: str, value: int) -> None:
    """Set one option of the context *fd* to the descriptor *value*."""
    _fsconfig(fd, FSCONFIG_SET_FD, key, None, value)


def _fsconfig(fd: int, command: int, key: str | None, value: str | None, number: int) -> None:
    result: int = _syscall(
        ctypes.c_long(_NR_FSCONFIG),
        ctypes.c_int(fd),
        ctypes.c_uint(command),
        ctypes.c_char_p(None if key is None else key.encode()),
        ctypes.c_char_p(None if value is None else os.fsencode(value)),
        ctypes.c_int(number),
    )
    if result < 0:
        error = _fail("fsconfig")
        raise OSError(error.errno, _context_log(fd) or error.strerror, "fsconfig")


def _context_log(fd: int) -> str:
    """Return what the kernel wrote into the log of a filesystem context, joined by '; '."""
    lines = []
    while True:
        try:
            lines.append(os.read(fd, 8192).decode(errors="replace").strip()[2:])
        except OSError:
            return "; ".join(line for line in lines if line)


def fsmount(fd: int, attributes: int) -> int:
    """Return a detached mount of the created context *fd* with MOUNT_ATTR_* *attributes*."""
    return _call(
        "fsmount",
        _NR_FSMOUNT,
        ctypes.c_int(fd),
        ctypes.c_uint(FSMOUNT_CLOEXEC),
        ctypes.c_uint(attributes),
    )


def mount_setattr_propagation(fd: int, propagation: int) -> None:
    """Change the propagation type of the mount *fd* is the root of, attached or never attached."""
    attributes = _MountAttr(0, 0, propagation, 0)
    _call(
        "mount_setattr",
        _NR_MOUNT_SETATTR,
        ctypes.c_int(fd),
        ctypes.c_char_p(b""),
        ctypes.c_uint(AT_EMPTY_PATH),
        ctypes.byref(attributes),
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )


def mount_propagation(path: str, flag: int) -> None:
    """Change the propagation type of the mount at *path* to one of MS_SHARED, MS_PRIVATE, …."""
    if _libc.mount(None, os.fsencode(path), None, ctypes.c_ulong(flag), None) < 0:
        raise _fail("mount")


def umount2(path: str, flags: int = 0) -> None:
    """Unmount the topmost mount at *path*; UMOUNT_NOFOLLOW is always added."""
    if _libc.umount2(os.fsencode(path), ctypes.c_int(flags | UMOUNT_NOFOLLOW)) < 0:
        raise _fail("umount2")


def umount_fd(fd: int, flags: int = 0) -> None:
    """Unmount the mount whose root *fd* is, wherever it is attached."""
    if _libc.umount2(f"/proc/self/fd/{fd}".encode(), ctypes.c_int(flags)) < 0:
        raise _fail("umount2")


def unshare(flags: int) -> None:
    """Leave the namespaces named by CLONE_* *flags* for new ones."""
    if _libc.unshare(ctypes.c_int(flags)) < 0:
        raise _fail("unshare")


def setns(fd: int, flags: int) -> None:
    """Join the namespaces named by CLONE_* *flags* of the process whose pidfd *fd* is (5.8)."""
    if _libc.setns(ctypes.c_int(fd), ctypes.c_int(flags)) < 0:
        raise _fail("setns")


def no_new_privs() -> None:
    """See to it that nothing this process becomes gains rights by set-id bits or capabilities."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_from_bounding_set(capability: int) -> None:
    """See to it that no program this process becomes has *capability*."""
    _prctl(_PR_CAPBSET_DROP, capability)


def _prctl(option: int, argument: int) -> None:
    zero = ctypes.c_ulong(0)
    if _libc.prctl(ctypes.c_int(option), ctypes.c_ulong(argument), zero, zero, zero) < 0:
        raise _fail("prctl")


def statx(fd: int, path: str = "", *, unique: bool = False) -> StatxResult:
    """Return mount id and mount-root flag of *fd*, or of *path* beneath it; follows no link.

    With *unique* the id is one that is never reused.

    :raises OSError: ENOSYS as well where the kernel does not know unique ids (before 6.8).
    """
    buffer = _Statx()
    want = STATX_MNT_ID_UNIQUE if unique else STATX_MNT_ID
    if (
        _libc.statx(
            ctypes.c_int(fd),
            os.fsencode(path),
            ctypes.c_int(AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT),
            ctypes.c_uint(want | STATX_TYPE),
            ctypes.byref(buffer),
        )
        < 0
    ):
        raise _fail("statx")
    if not buffer.mask & want:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), "statx")
    return StatxResult(buffer.mnt_id, mount_root=bool(buffer.attributes & STATX_ATTR_MOUNT_ROOT))


def fstatfs(fd: int) -> StatfsResult:
    """Return type, id and figures of the filesystem that *fd* lies on."""
    buffer = _Statfs()
    if _libc.fstatfs(ctypes.c_int(fd), ctypes.byref(buffer)) < 0:
        raise _fail("fstatfs")
    return StatfsResult(buffer)


def statfs(path: str) -> StatfsResult:
    """Like :func:`fstatfs`, by path; magic links of /proc are followed."""
    buffer = _Statfs()
    if _libc.statfs(os.fsencode(path), ctypes.byref(buffer)) < 0:
        raise _fail("statfs")
    return StatfsResult(buffer)


def listmount(namespace: int = 0, after: int = 0) -> bytes:
    """Return the unique ids of all mounts of this namespace beneath its root (Linux 6.8).

    As the kernel gives them: unsigned 64-bit numbers, ascending, those greater than *after*.
    *namespace* is the id of another mount namespace (Linux 6.11).
    """
    size = ctypes.sizeof(_MntIdReq) if namespace else _MNT_ID_REQ_SIZE_VER0
    request = _MntIdReq(size, 0, LSMT_ROOT, after, namespace)
    room = 4096
    buffer = (ctypes.c_uint64 * room)()
    found = b""
    while True:
        count = _call(
            "listmount",
            _NR_LISTMOUNT,
            ctypes.byref(request),
            ctypes.byref(buffer),
            ctypes.c_size_t(room),
            ctypes.c_uint(0),
        )
        found += memoryview(buffer).cast("B")[: count * 8]
        if count < room:
            return found
        request.param = buffer[count - 1]


def statmount_magic(mount: int, namespace: int) -> int:
    """Return the filesystem's magic of the *mount* with this unique id in *namespace* (6.11)."""
    request = _MntIdReq(ctypes.sizeof(_MntIdReq), 0, mount, STATMOUNT_SB_BASIC, namespace)
    buffer = _Statmount()
    _call(
        "statmount",
        _NR_STATMOUNT,
        ctypes.byref(request),
        ctypes.byref(buffer),
        ctypes.c_size_t(ctypes.sizeof(buffer)),
        ctypes.c_uint(0),
    )
    magic: int = buffer.sb_magic
    return magic


def next_mount_namespace(fd: int, request: int) -> tuple[int, int]:
    """Return fd and id of the mount namespace after or before that of *fd* (Linux 6.12).

    *request* is NS_MNT_GET_NEXT or NS_MNT_GET_PREV; those that the caller may not administer are
    left out.

    :raises OSError: ENOENT at the end, ENOTTY where the kernel cannot tell.
    """
    info = bytearray(16)  # struct mnt_ns_info: size, number of mounts, id
    info[:4] = len(info).to_bytes(4, "little")
    found = fcntl.ioctl(fd, request, info)
    return found, int.from_bytes(info[8:], "little")
