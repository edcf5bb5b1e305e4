#!/bin/sh
# The whole way on the demo's pictures. Each command can be typed by hand, again and again: what is done stays done.
set -eu
run() { printf '\n$ %s\n' "$*"; "$@"; }

run python -m jobs.demo.prepare models out/demo/models
run pixart caption jobs/demo/caption.toml
run pixart stats jobs/demo/stats.toml
run pixart extract jobs/demo/extract.toml
run pixart verify out/demo/features
run pixart train jobs/demo/train.toml
run pixart sample jobs/demo/sample.toml

cat <<'END'

The demo ran to its end. Its models have random weights, so that captions are noise and pictures are blur; a real run
differs in the model ids of the job files. Look at:
  captions    out/demo/captions/               pixart inspect out/demo/captions
  report      out/demo/report/report.html
  shards      out/demo/features/               pixart inspect out/demo/features
  checkpoint  out/demo/run/                    pixart inspect out/demo/run
  grid        out/demo/samples/grid.png
END
