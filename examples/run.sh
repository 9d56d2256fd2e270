#!/bin/sh
# Train an example in a base directory of its own: `sh examples/run.sh rft [FOLDER]`. What it leaves is in FOLDER.
set -eu
example=$(cd "$(dirname "$0")/$1" && pwd)
folder=${2:-$(mktemp -d)}
finetuned init "$folder"
cp "$example/config.json" "$folder/config.json"
for file in "$example"/*.jsonl; do cp "$file" "$folder/inbox/"; done
finetuned run --once --base-dir "$folder"
finetuned status --base-dir "$folder"
