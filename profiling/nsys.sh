#!/bin/sh
# A timeline of iterations 10 to 14 of a training run by Nsight Systems:
#     profiling/nsys.sh REPORT --config gpt2_124m [--flag=value ...]
# writes REPORT.nsys-rep; the run goes on to its end. Open it in nsys-ui, or: nsys stats REPORT.nsys-rep
set -eu
report=${1:?usage: profiling/nsys.sh REPORT --config NAME [--flag=value ...]}
shift
exec nsys profile --output "$report" --force-overwrite true --trace cuda,nvtx,cublas --cuda-graph-trace node \
    --capture-range cudaProfilerApi --capture-range-end stop \
    python -m nanogpt_fast.train --profile=10:15 --profiler=nsys "$@"
