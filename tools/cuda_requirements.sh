#!/usr/bin/env bash
# Prints the wheels, one requirement a line, that complete this machine's CUDA compiler: none when its toolkit is whole,
# cuRAND's headers when only they are missing, the whole compiler when there is no nvcc.
set -euo pipefail

nvcc=${CUDACXX:-$(command -v nvcc || true)}
for root in "${CUDA_HOME:-}" /usr/local/cuda; do
  [[ -z $nvcc && -n $root && -x $root/bin/nvcc ]] && nvcc=$root/bin/nvcc
done

if [[ -z $nvcc ]]; then
  echo 'cuda-toolkit[nvcc,cccl,curand,cudart]==13.0.*'
elif ! "$nvcc" -E -x cu - >/dev/null 2>&1 <<<'#include <curand_kernel.h>'; then
  release=$("$nvcc" --version | sed -nE 's/.*release ([0-9]+)\..*/\1/p')
  case $release in
    13) echo 'nvidia-curand==10.4.0.*' ;;
    *)
      echo "nvcc $release has no curand_kernel.h: install that toolkit's cuRAND, or make CUDA=OFF" >&2
      exit 1
      ;;
  esac
fi
