#!/usr/bin/env python3
"""Publishes events of a local process to a running tapio-collector, by docs/records.md and nothing else.

    publish.py SOCKET [COUNT]

Needs Python 3.10 and x86-64: the stores below are made in order there, which the layout asks for. The full barrier before
need_wakeup is missing, as Python has none; the collector never sleeps without a timeout, so a record may at worst wait for it.
"""
import fcntl, mmap, os, socket, struct, sys, time

PAGE = mmap.PAGESIZE
DATA = 1 << 16
BLOCK_IO, WRITE = 34, 1

path, count = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 100

# The ring: consumer page, producer page, data.
ring = os.memfd_create("publish.py", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
os.ftruncate(ring, 2 * PAGE + DATA)
fcntl.fcntl(ring, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
consumer = mmap.mmap(ring, PAGE, offset=0)
producer = mmap.mmap(ring, PAGE, offset=PAGE)
data = mmap.mmap(ring, DATA, offset=2 * PAGE)
struct.pack_into("<8sIIQ", producer, 192, b"tapioRB\0", 1, 0, DATA)
wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

# The handover.
name = b"publish.py"
collector = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
collector.connect(path)
socket.send_fds(collector, [b"TPIORING" + struct.pack("<II", 1, len(name)) + name], [ring, wakeup])
answer = collector.makefile("r").readline().strip()
if answer != "ok":
    sys.exit(f"the collector refused the ring: {answer}")

position = emitted = dropped = 0


def write(record):
    """Puts one record into the ring, or counts it as dropped when there is no room."""
    global position, emitted, dropped
    emitted += 1
    needed = (8 + len(record) + 7) // 8 * 8
    (consumed,) = struct.unpack_from("<Q", consumer, 0)
    struct.pack_into("<Q", producer, 64, emitted)
    if DATA - (position - consumed) < needed:
        dropped += 1
        struct.pack_into("<Q", producer, 128, dropped)
        return
    framed = (struct.pack("<II", len(record), 0) + record).ljust(needed, b"\0")
    at = position % DATA
    first = framed[: DATA - at]  # the rest goes to the beginning: readers map the data twice
    data[at : at + len(first)] = first
    data[: len(framed) - len(first)] = framed[len(first) :]
    position += needed
    struct.pack_into("<Q", producer, 0, position)
    if struct.unpack_from("<I", consumer, 64)[0]:
        struct.pack_into("<I", consumer, 64, 0)
        os.write(wakeup, struct.pack("=Q", 1))


for number in range(count):
    header = struct.pack("<HHIQQII", BLOCK_IO, 64, 0, time.clock_gettime_ns(time.CLOCK_BOOTTIME), 1, os.getpid(), os.getpid())
    write(header + struct.pack("<QQIiB7x", 200_000_000 + number, 4096, 8 << 20, 0, WRITE))

deadline = time.monotonic() + 10
while struct.unpack_from("<Q", consumer, 0)[0] != position:
    if time.monotonic() > deadline:
        sys.exit("the collector does not read the ring")
    time.sleep(0.005)
print(f"emitted {emitted} dropped {dropped}")
