#!/usr/bin/env python3
"""Drives the page in Debian's headless Chromium as a person would, and takes screenshots.

server/tests/web_browser.rs starts it with two servers: one that anyone may ask, and one that asks for a token. When it prints
`ready` a death is to be caused; it then waits for the open page to show it. Exit code 0: everything was as it must be.

It talks the DevTools protocol over two pipes, so it needs nothing but Python.
"""

import argparse
import base64
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

LIMIT_S = 30
WIDE = (1280, 900)
NARROW = (390, 844)
# What axe-core calls grave.
GRAVE = ("serious", "critical")


class Browser:
    """A Chromium, and the pipes to it."""

    def __init__(self, chromium, profile):
        to_read, self.to = os.pipe()
        self.of, of_write = os.pipe()

        def place():
            # The protocol's descriptors are 3 and 4, which may be those of the pipes.
            kept = os.dup(of_write)
            os.dup2(to_read, 3)
            os.dup2(kept, 4)
            os.set_inheritable(3, True)

        self.process = subprocess.Popen(
            [
                chromium, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--disable-extensions", "--ignore-certificate-errors", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
                "--force-color-profile=srgb", f"--user-data-dir={profile}", "about:blank",
            ],
            close_fds=False, preexec_fn=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(of_write)
        self.number, self.rest, self.events = 0, b"", []

    def message(self, deadline):
        while b"\0" not in self.rest:
            if time.monotonic() > deadline:
                raise TimeoutError("Chromium does not answer")
            chunk = os.read(self.of, 1 << 20)
            if not chunk:
                raise EOFError("Chromium has ended")
            self.rest += chunk
        text, self.rest = self.rest.split(b"\0", 1)
        return json.loads(text)

    def send(self, method, session=None, **params):
        self.number += 1
        call = {"id": self.number, "method": method, "params": params}
        if session:
            call["sessionId"] = session
        os.write(self.to, json.dumps(call).encode() + b"\0")
        deadline = time.monotonic() + LIMIT_S
        while True:
            message = self.message(deadline)
            if message.get("id") == self.number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            if "method" in message:
                self.events.append(message)

    def end(self):
        self.process.terminate()
        self.process.wait()


class Tab:
    """A page in it, and what a person does there."""

    def __init__(self, browser, axe, shots):
        self.browser, self.axe, self.shots = browser, axe, shots
        # What is wrong with pages: all of it is reported together.
        self.faults = []
        target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Security"):
            self.send(f"{domain}.enable")

    def send(self, method, **params):
        return self.browser.send(method, self.session, **params)

    def js(self, expression):
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def until(self, expression, what):
        deadline = time.monotonic() + LIMIT_S
        while True:
            try:
                if self.js(expression):
                    return
            except RuntimeError as error:
                # Between two pages there is none to ask.
                if not any(word in str(error).lower() for word in ("context", "navigated")):
                    raise
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {LIMIT_S} s at {self.js('location.href')}: {self.js('document.body.innerText')}")
            time.sleep(0.02)

    def open(self, url):
        self.send("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'", f"open {url}")

    def follow(self, selector):
        """Clicks a link or button and waits for the page that it leads to."""
        self.js("window.isOld = true")
        self.click(selector)
        self.until("!window.isOld && document.readyState === 'complete'", f"follow {selector}")

    def click(self, selector):
        at = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
            " const b = (e.querySelector('circle') || e).getBoundingClientRect();"
            " return [b.left + b.width / 2, b.top + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", clickCount=1)

    def key(self, key, code=0):
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        down = {"type": "keyDown", "key": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", **down, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def look(self, size, scheme):
        self.send("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=size == NARROW)
        features = [{"name": "prefers-color-scheme", "value": scheme}, {"name": "prefers-reduced-motion", "value": "reduce"}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def shoot(self, name):
        if not self.shots:
            return
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        (self.shots / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))

    def complaints(self):
        """What the console says: errors, and what the Content-Security-Policy refused."""
        said = []
        for event in self.browser.events:
            entry = event["params"].get("entry", {})
            is_error = event["method"] == "Log.entryAdded" and entry["level"] == "error"
            if is_error or event["method"] == "Runtime.exceptionThrown":
                said.append(json.dumps(event["params"]))
        self.browser.events.clear()
        return said

    def check(self, name):
        """What must hold of every page, at any size and in any colours."""
        self.faults += [f"{name}: {complaint}" for complaint in self.complaints()]
        wider = self.js("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if wider > 0:
            self.faults.append(f"{name} is {wider} wider than the screen")
        if self.axe:
            self.js(self.axe)
            found = self.js("axe.run(document, {resultTypes: ['violations']}).then(r => r.violations)")
            self.faults += [
                f"{name}: {one['id']} ({one['impact']}): {one['help']}: {[node['html'] for node in one['nodes']][:3]}"
                for one in found if one["impact"] in GRAVE
            ]
            # What axe itself tried is no fault of the page.
            self.complaints()


def follow_a_death(tab):
    """A page that is open shows a death as soon as it is found."""
    tab.until("document.getElementById('live').textContent === 'live'", "the page is live")
    before = tab.js("document.querySelectorAll('[data-id]').length")
    print("ready", flush=True)
    tab.until(f"document.querySelectorAll('[data-id]').length > {before}", "a new finding appears")
    tab.until("/new finding/.test(document.getElementById('live').textContent)", "and is announced")
    assert tab.js("document.querySelectorAll('.finding.new').length") >= 1


def use_filters(tab, server):
    tab.open(server + "/")
    tab.click("#filtering summary")
    tab.js("document.getElementById('severity').value = 'high'")
    tab.follow("#filters button")
    assert "severity=high" in tab.js("location.search"), tab.js("location.href")
    severities = tab.js("[...document.querySelectorAll('.finding .severity')].map(e => e.textContent)")
    assert severities and set(severities) <= {"high", "critical"}, severities
    assert tab.js("document.getElementById('severity').value") == "high"


def use_keys(tab, server):
    tab.open(server + "/")
    tab.key("/")
    assert tab.js("document.activeElement.id") == "severity"
    tab.js("document.activeElement.blur()")
    tab.key("j")
    tab.key("j")
    tab.key("k")
    assert tab.js("document.activeElement === document.querySelectorAll('a.title')[0]")
    tab.js("window.isOld = true")
    tab.key("Enter", 13)
    tab.until("!window.isOld && location.pathname.startsWith('/f/') && document.readyState === 'complete'", "Enter opens it")
    # The first thing that Tab reaches leads past the navigation.
    tab.key("Tab", 9)
    assert tab.js("document.activeElement.className") == "skip"


def copy_a_command(tab, server):
    tab.browser.send("Browser.grantPermissions", origin=server, permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    wanted = tab.js("document.querySelector('code[data-copy]').textContent")
    tab.click("code[data-copy] + button")
    tab.until("document.querySelector('code[data-copy] + button').textContent === 'Copied'", "it is copied")
    assert tab.js("navigator.clipboard.readText()") == wanted


def open_a_record(tab):
    tab.follow("a.mark")
    assert tab.js("location.pathname").startswith("/e/"), tab.js("location.href")
    assert "boottime_ns" in tab.js("document.querySelector('pre').textContent")


def read_without_scripts(tab, server, finding):
    tab.send("Emulation.setScriptExecutionDisabled", value=True)
    tab.send("Page.navigate", url=server + finding)
    deadline = time.monotonic() + LIMIT_S
    text = ""
    while "What to do" not in text:
        assert time.monotonic() < deadline, text
        try:
            root = tab.send("DOM.getDocument", depth=0)["root"]["nodeId"]
            text = tab.send("DOM.getOuterHTML", nodeId=root)["outerHTML"]
        except RuntimeError:
            # The page before it has just gone.
            time.sleep(0.02)
    for part in ("Death certificate", "<svg", "kubectl"):
        assert part in text, part
    tab.send("Emulation.setScriptExecutionDisabled", value=False)


def paste_a_token(tab, guarded, token):
    tab.open(guarded + "/?view=list")
    tab.shoot("login")
    # A page that is not let in is an error for the console.
    tab.complaints()
    tab.check("the login")
    tab.send("Input.insertText", text="wrong")
    tab.follow("form.login button")
    assert tab.js("document.querySelector('[role=alert]').textContent")
    tab.complaints()
    tab.js("document.getElementById('token').focus()")
    tab.send("Input.insertText", text=token)
    tab.js("window.isOld = true")
    tab.key("Enter", 13)
    tab.until("!window.isOld && document.querySelector('h1')?.textContent === 'Findings'", "it opens")
    assert tab.js("location.search") == "?view=list"
    cookies = tab.send("Network.getCookies", urls=[guarded + "/"])["cookies"]
    held = [cookie for cookie in cookies if cookie["name"] == "__Host-tapio"]
    assert held and held[0]["httpOnly"] and held[0]["secure"] and held[0]["sameSite"] == "Strict", cookies
    assert tab.js("document.cookie") == ""
    tab.complaints()
    # The cookie and the browser's word for this site let a form through.
    tab.open(guarded + "/silences?pattern=crashed")
    tab.click("#reason")
    tab.send("Input.insertText", text="over TLS")
    tab.follow("#silence button")
    assert "over TLS" in tab.js("document.querySelector('#active').textContent")
    # Another site's form brings no cookie.
    tab.open("data:text/html,<form method=post action='" + guarded + "/silences'><input name=pattern value=x><button>x</button></form>")
    tab.follow("button")
    assert "another site" in tab.js("document.body.textContent"), tab.js("document.body.textContent")
    tab.complaints()


def silence_and_acknowledge(tab, server, finding):
    """Fills in both forms by hand, and ends what it has said."""
    tab.open(server + finding)
    tab.click("#acknowledge input[name=reason]")
    tab.send("Input.insertText", text="on it <b>")
    tab.follow("#acknowledge button")
    assert "on it <b>" in tab.js("document.querySelector('.notice').textContent")
    tab.follow("a[href^='/silences?']")
    assert tab.js("document.getElementById('pattern').value"), "the form is filled in"
    tab.click("#reason")
    tab.send("Input.insertText", text="a rehearsal")
    tab.follow("#silence button")
    rows = "[...document.querySelectorAll('#active tbody tr')].map(e => e.textContent)"
    assert len(tab.js(rows)) == 2 and "a rehearsal" in tab.js(rows)[0], tab.js(rows)
    tab.shoot("silences")
    tab.check("/silences")
    tab.open(server + finding)
    tags = tab.js("[...document.querySelectorAll('.finding-head .tag')].map(e => e.textContent)")
    assert "silenced" in tags and "acknowledged" in tags, tags
    tab.shoot("silenced")
    tab.check("a silenced finding")
    tab.open(server + "/silences")
    for left in (1, 0):
        tab.follow("#active form button")
        assert len(tab.js(rows)) == left, tab.js(rows)


def see_every_page(tab, server, finding):
    workload = tab.js("document.querySelector('a[href^=\"/w/\"]')?.getAttribute('href')")
    node = tab.js("document.querySelector('a[href^=\"/n/\"]')?.getAttribute('href')")
    pages = {"findings": "/", "one-by-one": "/?view=list", "finding": finding, "workload": workload, "node": node, "ledger": "/ledger"}
    for scheme in ("light", "dark"):
        for size, called in ((WIDE, ""), (NARROW, "-narrow")):
            tab.look(size, scheme)
            for name, path in pages.items():
                tab.open(server + path)
                tab.shoot(f"{name}-{scheme}{called}")
                tab.check(f"{path}, {scheme}{called}")


def main():
    parser = argparse.ArgumentParser()
    for name in ("server", "guarded", "token", "finding"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--axe", type=pathlib.Path)
    parser.add_argument("--shots", type=pathlib.Path)
    asked = parser.parse_args()
    chromium = shutil.which("chromium")
    if not chromium:
        sys.exit("chromium is missing: deploy/local/install.sh chromium")
    axe = asked.axe.read_text() if asked.axe else None
    if asked.shots:
        asked.shots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(chromium, profile)
        try:
            tab = Tab(browser, axe, asked.shots)
            tab.look(WIDE, "light")
            tab.open(asked.server + "/")
            follow_a_death(tab)
            use_filters(tab, asked.server)
            use_keys(tab, asked.server)
            tab.open(asked.server + asked.finding)
            copy_a_command(tab, asked.server)
            tab.check("a finding")
            tab.open(asked.server + asked.finding)
            open_a_record(tab)
            tab.check("a record")
            tab.open(asked.server + asked.finding)
            see_every_page(tab, asked.server, asked.finding)
            tab.look(WIDE, "light")
            read_without_scripts(tab, asked.server, asked.finding)
            silence_and_acknowledge(tab, asked.server, asked.finding)
            paste_a_token(tab, asked.guarded, asked.token)
            if tab.faults:
                sys.exit("\n".join(tab.faults))
        finally:
            browser.end()
    print("everything is as it must be")


if __name__ == "__main__":
    main()
