#!/bin/sh
# Run the demo: a scratch copy of the project as a git repository, one scripted agent, one policy.
# With ANTHROPIC_API_KEY set, MODEL=anthropic:... does the same with a live model.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cp -R "$here/project" "$scratch/workspace"
cd "$scratch/workspace"
git init -q -b main
git add -A -f
git -c user.name=demo -c user.email=demo@localhost commit -q -m "Payment service"
cd "$scratch"
"${AGENT_RUNNER:-agent-runner}" run \
    --task "refactor payment service error handling" \
    --policy "$here/policy.yaml" --profile production \
    --workspace "$scratch/workspace" \
    --model "${MODEL:-script:$here/turns.yaml}" \
    "$@"
