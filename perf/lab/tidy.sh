#!/usr/bin/env bash
# Counts what makes this project harder to read, and fails where there is more of it than the bounds below. They only go down: after an
# improvement write the new number here. `perf/lab/tidy.sh -v` names every place.
set -euo pipefail
# So that what `count` notes at the end of a pipe is still known here.
shopt -s lastpipe
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
declare -A bound=(
  [sentences over 30 words in documents]=0 [documents whose median sentence has over 18 words]=0 [table cells over 30 words]=0
  [sentences over 30 words in pattern texts]=0 [sentences over 30 words in comments]=0
  [comments that say no more than See the module]=0 [test names over 10 words]=0 [commit subjects over 72 characters]=0
  [cycles of modules within a crate]=0 [imports that climb between the folders of the collector]=0
  [prints that panic where nobody reads]=0 [lines of docs/architecture.md over 250]=0 [files over 500 lines]=0
  [functions over 80 lines]=0
)
verbose=${1:-} failed=0
# Reads places, one a line, and compares how many they are with the bound.
count() {
  local what=$1 places n
  places=$(cat)
  n=$(grep -c . <<<"$places" || true)
  printf '%5d of at most %3d  %s\n' "$n" "${bound[$what]}" "$what"
  if [ "$n" -gt "${bound[$what]}" ] || { [ "$n" -gt 0 ] && [ "$verbose" = -v ]; }; then sed 's/^/        /' <<<"$places"; fi
  [ "$n" -le "${bound[$what]}" ] || failed=1
}
# Prints every sentence: file, line, words, beginning. It ends at .!? before a space, at an empty line, a heading, a list's item.
sentences='
  function flush(  parts, n, i, words) {
    gsub(/`[^`]*`/, "code", text)
    n = split(text, parts, /[.!?]( |$)|¶/)
    for (i = 1; i <= n; i++) {
      gsub(/^[ \t]+|[ \t]+$/, "", parts[i])
      words = split(parts[i], unused, /[ \t]+/)
      if (words > 0) print where "\t" at "\t" words "\t" substr(parts[i], 1, 60)
    }
    text = ""
  }
  function add(line) { if (text == "") { where = FILENAME; at = FNR }; text = text " " line }
  END { flush() }'
long() { awk -F'\t' '$3 > 30 { print $1 ":" $2 ": " $3 " words: " $4 }'; }
sources() { git ls-files '*.rs' '*.c' '*.h'; }; pages() { git ls-files 'README.md' 'docs/*.md' 'deploy/*.md'; }

documents=$(pages | xargs awk "$sentences"'
  FNR == 1 { flush(); is_code = 0 }
  /^ *```/ { is_code = !is_code; flush(); next }
  is_code || /^ *[|<#]/ || /^ *$/ { flush(); next }
  /^ *([-*]|[0-9]+\.) / { flush() }
  { add($0) }')
long <<<"$documents" | count 'sentences over 30 words in documents'
sort -t$'\t' -k1,1 -k3,3n <<<"$documents" | awk -F'\t' '
  function median() { if (n && words[int((n + 1) / 2)] > 18) print file ": " words[int((n + 1) / 2)] " words"; n = 0 }
  $1 != file { median(); file = $1 }
  { words[++n] = $3 }
  END { median() }' | count 'documents whose median sentence has over 18 words'
# The help of every metric is in docs/metrics.md.
pages | xargs awk '/^ *\|/ { line = $0; gsub(/\\\|/, "/", line); gsub(/`[^`]*`/, "code", line); n = split(line, cells, "|")
  for (i = 1; i <= n; i++) if ((words = split(cells[i], unused, " ")) > 30) print FILENAME ":" FNR ": " words " words: " substr(cells[i], 1, 60) }' | count 'table cells over 30 words'
git ls-files 'server/patterns/*.yaml' | xargs awk "$sentences"'
  FNR == 1 || /^ *([a-z_]+:|- |#)/ { flush() }
  { line = $0; gsub(/\[\[|\]\]/, "¶", line); add(line) }' | long | count 'sentences over 30 words in pattern texts'
sources | xargs awk "$sentences"'
  FNR == 1 { flush(); is_drawing = is_block = 0 }
  FILENAME ~ /\.rs$/ && /^ *\/\/[\/!]? ```/ { is_drawing = !is_drawing; flush(); next }
  FILENAME ~ /\.rs$/ && (is_drawing || !/^ *\/\/[\/!]? / || /^ *\/\/[\/!]? *\|/) { flush(); next }
  FILENAME ~ /\.rs$/ && /^ *\/\/[\/!]? *([-*#`]|[0-9]+\.)/ { flush() }
  FILENAME !~ /\.rs$/ { if (/\/\*/) { flush(); is_block = 1 } if (!is_block || /^ *\*? *$/) { flush(); next } if (/\*\//) is_block = 0 }
  { line = $0; sub(/^[ \t]*\/\/[\/!]? /, "", line); gsub(/^.*\/\*|\*\/.*|^[ \t]*\* ?/, "", line); add(line) }' | long | count 'sentences over 30 words in comments'
{ git grep -nE '^ *//[/!] *See the module' -- '*.rs' || true; } | count 'comments that say no more than See the module'
git ls-files '*.rs' | xargs awk '/#\[(tokio::)?test[](]/ { is_test = 1; next }
  is_test && match($0, /fn [a-z0-9_]+/) { is_test = 0; if (split(substr($0, RSTART + 3, RLENGTH - 3), unused, "_") > 10) print FILENAME ":" FNR ": " $0 }' | count 'test names over 10 words'
git log -50 --format=%s | awk 'length > 72' | count 'commit subjects over 72 characters'
# A module is a file or folder right below src; what a file uses of its own crate names another one. Tests may use any.
for crate in probes ringbuf collector server wire perf; do
  git ls-files "$crate/src/*.rs" | grep -vE '/bin/|/tests(/|\.rs)|/(lib|main)\.rs$' | xargs awk -v crate=$crate '
    FNR == 1 { is_test = 0; split(substr(FILENAME, length(crate) + 6), own, /[\/.]/) }
    /^#\[cfg\(test\)\]/ { is_test = 1 }
    is_test || /^ *\/\// { next }
    { line = $0
      if (sub(/crate::\{/, "crate::", line)) { while (line !~ /;/ && (getline more) > 0) line = line more; gsub(/, */, " crate::", line) }
      for (; match(line, /crate::[a-z_0-9]+/); line = substr(line, RSTART + RLENGTH)) {
        name = substr(line, RSTART + 7, RLENGTH - 7); if (name != own[1]) print crate "/" own[1], crate "/" name } }'
done | sort -u | { tsort 2>&1 >/dev/null || true; } | sed 's/^tsort: //' | awk '/contains a loop/ { if (loop) print loop; loop = ""; next } { loop = loop " " $0 } END { if (loop) print loop }' |
  count 'cycles of modules within a crate'
# The collector's folders from the bottom up. What a file uses of a folder above its own climbs; `pipeline.rs` is above all of them.
layers=(base settings budget outbox ship intake source serve pipeline)
for at in "${!layers[@]}"; do
  above=$(IFS='|'; echo "${layers[*]:at + 1}")
  [ -z "$above" ] || git grep -noE "crate::($above)\b" -- "collector/src/${layers[at]}/" || true
done | count 'imports that climb between the folders of the collector'
# wire/src/program/output.rs prints without a panic. Tests say in their own way that they are skipped.
{ git grep -nE '\be?print(ln)?!\(' -- '*/src/*.rs' | grep -vE 'SKIP|/tests\.rs:|output\.rs:|: *//' || true; } | count 'prints that panic where nobody reads'
sed -n '251,$p' docs/architecture.md | count 'lines of docs/architecture.md over 250'
sources | xargs wc -l | awk '$2 != "total" && $1 > 500 { print $2 ": " $1 " lines" }' | count 'files over 500 lines'
# rustfmt puts a function's last brace below its `fn`.
git ls-files '*.rs' | xargs awk '
  FNR == 1 { depth = -1 }
  /^ *((pub(\([a-z]+\))?|const|async|unsafe|extern "C") )*fn / && depth < 0 { name = $0; at = FNR; match($0, /^ */); depth = RLENGTH }
  depth >= 0 && /^ *\}/ { match($0, /^ */); if (RLENGTH == depth) { if (FNR - at + 1 > 80) print FILENAME ":" at ": " FNR - at + 1 " lines"; depth = -1 } }
  depth >= 0 && FNR > at && /;$/ { match($0, /^ */); if (RLENGTH == depth) depth = -1 }' | count 'functions over 80 lines'
exit $failed
