#!/bin/sh
# Makes the stubs in protos/ps/v1 from the .proto files beside them; run by `make protos`.
# The oldest supported grpcio-tools is used, since newer runtimes accept older stubs and not the reverse.
set -eu
cd "$(dirname "$0")/.."
out=${1:-.}
"${PYTHON:-python3}" -m grpc_tools.protoc -I. \
  --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" protos/ps/v1/*.proto
