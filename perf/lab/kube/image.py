#!/usr/bin/env python3
"""Makes a container image out of files: image.py NAME:TAG ENTRYPOINT_JSON SOURCE=DESTINATION... > image.tar

The result is a docker-archive with one layer, for `ctr images import -`. Nothing is fetched from anywhere.
"""
import hashlib
import io
import json
import os
import sys
import tarfile


def layer_of(files):
    data = io.BytesIO()
    made = set()
    with tarfile.open(fileobj=data, mode="w") as layer:
        for source, destination in files:
            path = destination.strip("/")
            parents = path.split("/")[:-1]
            for depth in range(1, len(parents) + 1):
                directory = "/".join(parents[:depth])
                if directory not in made:
                    made.add(directory)
                    entry = tarfile.TarInfo(directory)
                    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                    layer.addfile(entry)
            layer.add(os.path.realpath(source), arcname=path)
    return data.getvalue()


def main():
    name, entrypoint = sys.argv[1], json.loads(sys.argv[2])
    layer = layer_of(pair.split("=", 1) for pair in sys.argv[3:])
    layer_id = hashlib.sha256(layer).hexdigest()
    config = json.dumps({
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine),
        "os": "linux",
        "config": {"Entrypoint": entrypoint, "Env": ["PATH=/bin:/usr/bin"]},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + layer_id]},
    }).encode()
    config_name = hashlib.sha256(config).hexdigest() + ".json"
    manifest = json.dumps([{"Config": config_name, "RepoTags": [name], "Layers": [layer_id + "/layer.tar"]}]).encode()
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as image:
        for path, data in [(config_name, config), (layer_id + "/layer.tar", layer), ("manifest.json", manifest)]:
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            image.addfile(entry, io.BytesIO(data))


main()
