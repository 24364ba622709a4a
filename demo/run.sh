#!/usr/bin/env bash
# The pipeline from files to labels on the made-up catalogue, with the small model that comes with the project.
# Run by `make demo`, which has set everything up. Its tables stay in .cache/demo/tables, to look around in.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
data=.cache/demo
tables=$data/tables
times=()

step() {
    local name=$1 began=$SECONDS
    shift
    echo
    echo "== $name"
    printf '$ %s\n' "${*/#$python/python}"
    "$@"
    times+=("$(printf '%5d s  %s' $((SECONDS - began)) "$name")")
}

mkdir -p "$data"
rm -rf "$tables"
some="SELECT pair_id FROM gold WHERE split = 'test' ORDER BY xxhash64(pair_id) LIMIT 12"
step "model: SmolLM2-135M-Instruct as an ordinary model folder" $python -m demo.model
step "catalogue: products, queries, labels, reasoning" $python -m demo.catalogue --out "$data"
step "jobs: from the file to tiers, one Spark for all of them" ./spark-submit.sh \
    ingest --tables $tables --pairs $data/pairs.jsonl --source demo \
    then rescore --tables $tables --model demo \
    then explain --tables $tables --model demo --pairs "$some" \
    then fit_thresholds --tables $tables \
    then promote_thresholds --tables $tables --version 1 --reason "the demo's first" \
    then publish --tables $tables \
    then sql --tables $tables --width 60 "
    SELECT labels.query, title AS product, g.label AS human, labels.tier, round(p_excellent, 2) AS p4, round(p_related, 2) AS p3,
        round(p_mismatch, 2) AS p2, round(p_irrelevant, 2) AS p1, e.label AS explained, chain
    FROM labels JOIN pairs USING (pair_id) JOIN gold g USING (pair_id) JOIN explanations e USING (pair_id)
    ORDER BY xxhash64(pair_id)"

echo
echo "Each step took:"
printf '%s\n' "${times[@]}"
echo
echo "Look around: ./spark-submit.sh sql --tables $tables"
