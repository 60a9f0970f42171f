#!/usr/bin/env python3
"""What check.sh does with parsed manifests.

  checksums [--update] FILE...   the annotation tapio.dev/config-checksum is that of the file's ConfigMap
  rules FILE                     the groups of a PrometheusRule, as Prometheus itself reads them
  same LEFT RIGHT                both files hold the same objects, whatever their order, their configurations' comments, and how
                                 a changed configuration rolls out (by a hash in its name or by an annotation)
  digests FILE                   every image is named by its digest
  findings EXCEPTIONS FILE       checkov's JSON output has the failures that are excepted, and no others
"""
import hashlib
import json
import re
import sys

import yaml

ANNOTATION = "tapio.dev/config-checksum"


def objects(path):
    with open(path, encoding="utf-8") as file:
        return [document for document in yaml.safe_load_all(file) if document]


def normal(thing):
    """Without what `same` does not compare. The namespace is not a chart's own."""
    text = json.dumps(thing)
    thing = json.loads(re.sub(r"(tapio-(?:server|collector|nats)-config)-[a-z0-9]{10}\b", r"\1", text))
    for name, data in thing.get("data", {}).items() if thing["kind"] == "ConfigMap" else ():
        lines = [line for line in data.splitlines() if not line.lstrip().startswith("#")]
        thing["data"][name] = yaml.safe_load(data) if name.endswith(".yaml") else lines
    annotations = thing.get("spec", {}).get("template", {}).get("metadata", {}).get("annotations", {})
    annotations.pop(ANNOTATION, None)
    if not annotations:
        thing.get("spec", {}).get("template", {}).get("metadata", {}).pop("annotations", None)
    return thing


def key(thing):
    metadata = thing["metadata"]
    return f"{thing['apiVersion']} {thing['kind']} {metadata.get('namespace', '-')}/{metadata['name']}"


def checksums(paths, update):
    wrong = []
    for path in paths:
        maps = [thing["data"] for thing in objects(path) if thing["kind"] == "ConfigMap"]
        wanted = hashlib.sha256(json.dumps(maps, sort_keys=True).encode()).hexdigest()[:16]
        with open(path, encoding="utf-8") as file:
            text = file.read()
        found = re.findall(rf"{ANNOTATION}: *(\S+)", text)
        if len(found) != 1:
            wrong.append(f"{path}: {len(found)} annotations {ANNOTATION}, not one")
        elif found[0].strip('"') != wanted and update:
            with open(path, "w", encoding="utf-8") as file:
                file.write(re.sub(rf"({ANNOTATION}:) *\S+", rf'\1 "{wanted}"', text))
        elif found[0].strip('"') != wanted:
            wrong.append(f"{path}: {ANNOTATION} is not that of the ConfigMap; run deploy/check.sh --update")
    return wrong


def same(left, right):
    every = [[normal(thing) for thing in objects(path) if thing["kind"] != "Namespace"] for path in (left, right)]
    sides = [{key(thing): thing for thing in things} for things in every]
    if not sides[0]:
        return [f"{left} is empty"]
    wrong = [f"only in {left}: {name}" for name in sides[0].keys() - sides[1].keys()]
    wrong += [f"only in {right}: {name}" for name in sides[1].keys() - sides[0].keys()]
    for name in sorted(sides[0].keys() & sides[1].keys()):
        wrong += differences(sides[0][name], sides[1][name], name)
    return wrong


def differences(left, right, where):
    if isinstance(left, dict) and isinstance(right, dict):
        found = []
        for name in sorted(left.keys() | right.keys()):
            found += differences(left.get(name), right.get(name), f"{where} .{name}")
        return found
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        return [line for at, pair in enumerate(zip(left, right)) for line in differences(*pair, f"{where}[{at}]")]
    return [] if left == right else [f"{where}: {left!r} is not {right!r}"]


def digests(path):
    images = re.findall(r"^\s*-?\s*image:\s*(\S+)", open(path, encoding="utf-8").read(), re.MULTILINE)
    wrong = [f"{path}: {image} is not named by digest" for image in images if not re.search(r"@sha256:[0-9a-f]{64}$", image)]
    return wrong if images else [f"{path}: no image"]


def findings(exceptions, output):
    with open(output, encoding="utf-8") as file:
        reports = json.load(file)
    reports = reports if isinstance(reports, list) else [reports]
    if not sum(report["summary"]["passed"] for report in reports):
        return ["checkov looked at nothing"]
    found = {}
    for failure in (failure for report in reports for failure in report["results"]["failed_checks"]):
        name = "production" if "production" in failure["file_path"] else "default"
        found[failure["check_id"], failure["resource"], name] = failure["check_name"]
    excepted = set()
    with open(exceptions, encoding="utf-8") as file:
        for entry in yaml.safe_load(file):
            names = [entry["only"]] if "only" in entry else ["default", "production"]
            excepted |= {(entry["check"], thing, name) for thing in entry["resources"] for name in names if entry["reason"]}
    # A workload that only one of the two has.
    excepted -= {key for key in excepted if key[1] == "Deployment.tapio-system.tapio-server" and key[2] == "production"}
    excepted -= {key for key in excepted if key[1] == "StatefulSet.tapio-system.tapio-server" and key[2] == "default"}
    wrong = [f"{' '.join(key)}: {found[key]}" for key in sorted(found.keys() - excepted)]
    return wrong + [f"{' '.join(key)}: the exception is not needed any more" for key in sorted(excepted - found.keys())]


def main():
    command, arguments = sys.argv[1], sys.argv[2:]
    if command == "rules":
        groups = [group for thing in objects(arguments[0]) for group in thing["spec"]["groups"]]
        yaml.safe_dump({"groups": groups}, sys.stdout, sort_keys=False)
        return
    wrong = {
        "checksums": lambda: checksums([a for a in arguments if a != "--update"], "--update" in arguments),
        "same": lambda: same(*arguments),
        "digests": lambda: digests(*arguments),
        "findings": lambda: findings(*arguments),
    }[command]()
    if wrong:
        sys.exit("\n".join(wrong))


main()
