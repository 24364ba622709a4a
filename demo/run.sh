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
step "model: SmolLM2-135M-Instruct as an ordinary model folder (not tuned yet)" $python -m demo.model
step "catalogue: products, queries, labels, reasoning" $python -m demo.catalogue --out "$data"
step "ingest: pairs and judgements into Delta" ./spark-submit.sh ingest --tables $tables --pairs $data/pairs.jsonl
step "rescore: label probabilities for every pair" ./spark-submit.sh rescore --tables $tables --model demo
step "sql: what an analyst sees" ./spark-submit.sh sql --tables $tables --width 36 "
    SELECT query, title AS product, label AS human, round(p_excellent, 3) AS p_excellent, round(p_related, 3) AS p_related,
        round(p_mismatch, 3) AS p_mismatch, round(p_irrelevant, 3) AS p_irrelevant, round(p_outside, 3) AS p_outside
    FROM pairs JOIN label_probs USING (pair_id, query, product_id, locale) JOIN gold USING (pair_id)
    WHERE split = 'test' ORDER BY xxhash64(pair_id) LIMIT 16"

echo
echo "Each step took:"
printf '%s\n' "${times[@]}"
echo
echo "Look around: ./spark-submit.sh sql --tables $tables"
