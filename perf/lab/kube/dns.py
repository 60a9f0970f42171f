#!/usr/bin/env python3
"""The lab's cluster DNS: answers NAME.NAMESPACE.svc.cluster.local from the API server, as CoreDNS would.

    dns.py ADDRESS API_SERVER TOKEN

A headless Service is the addresses of its ready endpoints, any other its cluster address. IPv4 over UDP; there is nothing else
in the lab. Every query asks the API server, so an answer is never old.
"""
import json
import socketserver
import ssl
import struct
import sys
import urllib.error
import urllib.request

DOMAIN = "cluster.local"
A, ANY = 1, 255
NO_ERROR, SERVER_FAILURE, NO_SUCH_NAME = 0, 2, 3
TTL_SECONDS = 1

ADDRESS, API_SERVER, TOKEN = sys.argv[1:4]
# The lab's API server signs for itself, and is in the same network namespace.
UNVERIFIED = ssl._create_unverified_context()


def get(path):
    request = urllib.request.Request(API_SERVER + path, headers={"Authorization": "Bearer " + TOKEN})
    with urllib.request.urlopen(request, context=UNVERIFIED, timeout=2) as response:
        return json.load(response)


def addresses_of(name):
    """The addresses of a name, or None when it does not exist."""
    labels = name.lower().rstrip(".").split(".")
    if labels[2:] != ["svc"] + DOMAIN.split("."):
        return None
    path = "/api/v1/namespaces/%s/%%s/%s" % (labels[1], labels[0])
    try:
        address = get(path % "services")["spec"].get("clusterIP", "None")
        if address != "None":
            return [address]
        subsets = get(path % "endpoints").get("subsets") or []
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    return [address["ip"] for subset in subsets for address in subset.get("addresses") or []]


def question_of(query):
    labels, at = [], 12
    while query[at]:
        labels.append(query[at + 1:at + 1 + query[at]].decode("ascii"))
        at += 1 + query[at]
    return ".".join(labels), struct.unpack_from("!H", query, at + 1)[0], query[12:at + 5]


def answer_to(query):
    name, kind, question = question_of(query)
    records, code = [], NO_ERROR
    try:
        found = addresses_of(name)
        if found is None:
            code = NO_SUCH_NAME
        elif kind in (A, ANY):
            records = [bytes(map(int, address.split("."))) for address in found]
    except Exception as error:
        print(f"{name}: {error}", flush=True)
        code = SERVER_FAILURE
    # A response, authoritative, recursion desired as it was asked.
    flags = 0x8400 | (struct.unpack_from("!H", query, 2)[0] & 0x0100) | code
    head = query[:2] + struct.pack("!5H", flags, 1, len(records), 0, 0)
    # Each record points to the question's name, at byte 12.
    return head + question + b"".join(
        struct.pack("!HHHIH", 0xC00C, A, 1, TTL_SECONDS, len(data)) + data for data in records)


class Query(socketserver.BaseRequestHandler):
    def handle(self):
        data, reply = self.request
        try:
            reply.sendto(answer_to(data), self.client_address)
        except (IndexError, UnicodeDecodeError, struct.error):
            # No query: nobody who waits for an answer sends this.
            pass


class Server(socketserver.ThreadingUDPServer):
    allow_reuse_address = True
    daemon_threads = True


Server((ADDRESS, 53), Query).serve_forever()
