#!/usr/bin/env bash
# Builds README.md, docs/ and deploy/README.md as one book: `make book`. The table of contents is docs/README.md.
#   book.sh             writes target/book/html/index.html; ends with 1 when a link in it leads nowhere
# mdbook is put under target/tools once, pinned; after that nothing is fetched.
set -euo pipefail
MDBOOK_VERSION=0.5.4
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$top"
target=${CARGO_TARGET_DIR:-$top/target}
mkdir -p "$target/tools"
target=$(cd "$target" && pwd)
tool=$target/tools/mdbook-$MDBOOK_VERSION
mdbook=$tool/bin/mdbook
book=$target/book

if [ ! -x "$mdbook" ]; then
  echo "Installing mdbook $MDBOOK_VERSION to $tool, which takes some minutes"
  cargo install mdbook --locked --version "$MDBOOK_VERSION" --no-default-features --features search \
    --root "$tool" --target-dir "$tool/build" || { echo "book: mdbook could not be built; it needs the crates registry once" >&2; exit 1; }
  rm -rf "$tool/build"
fi

# The book's pages lie as they do here, so that links between them are the same.
rm -rf "$book"
mkdir -p "$book/src/docs" "$book/src/deploy"
cp docs/book.toml "$book/"
cp README.md LICENSE "$book/src/"
cp docs/*.md "$book/src/docs/"
cp -r docs/sql "$book/src/docs/"
cp deploy/README.md "$book/src/deploy/"

# Each heading of docs/README.md is a part, each first link of a row a chapter, under the title that its page has.
{
  echo "# Summary"
  echo
  echo "[Tapio](README.md)"
  echo "[All pages](docs/README.md)"
  seen=
  while IFS= read -r line; do
    case $line in
      '## '*) printf '\n# %s\n\n' "${line#\#\# }" ;;
      '| ['*)
        page=${line#*](}
        page=${page%%)*}
        page=${page%%#*}
        case $page in ../*) page=${page#../} ;; *) page=docs/$page ;; esac
        case " $seen " in *" $page "*) continue ;; esac
        seen+=" $page"
        printf -- '- [%s](%s)\n' "$(sed -n '/^# /{s///p;q}' "$page")" "$page"
        ;;
    esac
  done <docs/README.md
} >"$book/src/SUMMARY.md"
for page in docs/*.md; do
  grep -qF "($page)" "$book/src/SUMMARY.md" || { echo "book: docs/README.md does not list $page" >&2; exit 1; }
done

"$mdbook" build "$book"

python3 - "$book/html" <<'PYTHON'
"""Every link inside the book leads to a file, and to an id in it where it names one."""
import html.parser, pathlib, sys, urllib.parse

class Page(html.parser.HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)

top = pathlib.Path(sys.argv[1]).resolve()
pages = {path: Page(path) for path in top.rglob("*.html")}
dead = []
for path, page in pages.items():
    if path.name == "404.html":  # its links count from the address that was not found
        continue
    for link in page.links:
        url = urllib.parse.urlparse(link)
        if url.scheme or url.netloc:
            continue
        to = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
        if not to.is_file() or (url.fragment and to in pages and urllib.parse.unquote(url.fragment) not in pages[to].ids):
            dead.append(f"{path.relative_to(top)}: {link}")
if dead:
    sys.exit("book: dead links:\n" + "\n".join(sorted(set(dead))))
print(f"book: {len(pages)} pages, no dead link: {top}/index.html")
PYTHON
