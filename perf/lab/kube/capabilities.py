#!/usr/bin/env python3
"""Takes the capabilities that this process may not have out of an OCI specification: of a container, or of a process in one."""
import json
import sys

# In the order of linux/capability.h.
NAMES = """CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT
SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG
WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE""".split()


def bounding_set():
    with open("/proc/self/status") as status:
        bits = int(next(line for line in status if line.startswith("CapBnd:")).split()[1], 16)
    return {"CAP_" + name for number, name in enumerate(NAMES) if bits >> number & 1}


def main():
    path = sys.argv[1]
    with open(path) as file:
        specification = json.load(file)
    capabilities = specification.get("process", specification).get("capabilities") or {}
    possible = bounding_set()
    missing = {name for names in capabilities.values() for name in names or []} - possible
    if not missing:
        return
    for kind, names in capabilities.items():
        capabilities[kind] = [name for name in names or [] if name in possible]
    with open(path, "w") as file:
        json.dump(specification, file)


main()
