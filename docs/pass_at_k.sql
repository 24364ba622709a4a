-- pass@k of each pair, by run, by k (1, 2, 4 … and n) and by way to be right (label; label and chain): the chance that
-- at least one of k answers is right, unbiased (Chen et al. 2021, arXiv 2107.03374), over the table samples.
-- Runs in Spark and DuckDB. Made from jobs/sample.py; a test holds the two together.
WITH judged AS (
    SELECT run_id, pair_id, gold, sample, 'label' AS what, correct AS is_right FROM samples
    UNION ALL
    SELECT run_id, pair_id, gold, sample, 'label and chain' AS what, correct AND agrees AND finished AS is_right
    FROM samples
),
counted AS (
    SELECT run_id, pair_id, gold, what, count(*) AS n, sum(CASE WHEN is_right THEN 1 ELSE 0 END) AS c
    FROM judged GROUP BY run_id, pair_id, gold, what
),
ks AS (
    SELECT DISTINCT run_id, sample + 1 AS k FROM samples
    WHERE sample + 1 IN (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    UNION
    SELECT run_id, max(sample) + 1 AS k FROM samples GROUP BY run_id
),
placed AS (
    SELECT run_id, pair_id, what, row_number() OVER (PARTITION BY run_id, pair_id, what ORDER BY sample) AS place
    FROM judged WHERE is_right
)
SELECT counted.run_id, counted.pair_id, counted.gold, counted.what, counted.n, counted.c, ks.k,
    CASE
        WHEN counted.c = 0 THEN 0.0
        WHEN counted.n - counted.c < ks.k THEN 1.0
        ELSE 1.0 - exp(sum(ln(
            CASE
                WHEN counted.n - counted.c < ks.k OR placed.place IS NULL THEN CAST(1 AS DOUBLE)
                ELSE 1 - CAST(ks.k AS DOUBLE) / (counted.n - counted.c + placed.place)
            END
        )))
    END AS pass
FROM counted
JOIN ks ON ks.run_id = counted.run_id AND ks.k <= counted.n
LEFT JOIN placed
    ON placed.run_id = counted.run_id AND placed.pair_id = counted.pair_id AND placed.what = counted.what
GROUP BY counted.run_id, counted.pair_id, counted.gold, counted.what, counted.n, counted.c, ks.k
