-- The tier in force for each pair: the rule of CumPT over the tables thresholds, label_probs and pairs.
-- Runs in Spark, DuckDB and Polars. Made from partitioner/tiers.py; a test holds the two together.
WITH cut AS (
    SELECT version, segment, segment_by, model_id, prompt_id, temperature,
           MAX(CASE WHEN boundary = 4 THEN tau END) AS tau4,
           MAX(CASE WHEN boundary = 3 THEN tau END) AS tau3,
           MAX(CASE WHEN boundary = 2 THEN tau END) AS tau2
    FROM thresholds
    WHERE status = 'active'
    GROUP BY version, segment, segment_by, model_id, prompt_id, temperature
), judged AS (
    SELECT l.pair_id, l.query, l.product_id, l.locale, l.p_excellent, l.p_related, l.p_mismatch, l.p_irrelevant,
           l.outcome, l.content_hash <> p.content_hash AS stale, g.version, g.model_id, g.prompt_id, g.temperature,
           g.tau4 AS other4, g.tau3 AS other3, g.tau2 AS other2,
           CASE g.segment_by WHEN 'locale' THEN p.locale WHEN 'category' THEN p.category WHEN 'brand' THEN p.brand END AS segment
    FROM label_probs AS l
    JOIN cut AS g ON l.model_id = g.model_id AND l.prompt_id = g.prompt_id
    JOIN pairs AS p ON l.pair_id = p.pair_id
    WHERE g.segment = ''
), raised AS (
    SELECT judged.*,
           COALESCE(s.tau4, other4) AS tau4, COALESCE(s.tau3, other3) AS tau3, COALESCE(s.tau2, other2) AS tau2,
           CASE WHEN temperature = 1 THEN p_excellent ELSE POWER(p_excellent, 1.0 / temperature) END AS q4,
           CASE WHEN temperature = 1 THEN p_related ELSE POWER(p_related, 1.0 / temperature) END AS q3,
           CASE WHEN temperature = 1 THEN p_mismatch ELSE POWER(p_mismatch, 1.0 / temperature) END AS q2,
           CASE WHEN temperature = 1 THEN p_irrelevant ELSE POWER(p_irrelevant, 1.0 / temperature) END AS q1
    FROM judged
    LEFT JOIN (SELECT segment AS of_segment, tau4, tau3, tau2 FROM cut) AS s ON judged.segment = s.of_segment
), summed AS (
    SELECT *, CASE WHEN temperature = 1 THEN 1.0 ELSE ((q4 + q3) + q2) + q1 END AS total
    FROM raised
), cumulated AS (
    SELECT *, q4 / total AS c4, (q4 + q3) / total AS c3, ((q4 + q3) + q2) / total AS c2
    FROM summed
), tiered AS (
    SELECT *, CASE WHEN c4 IS NULL THEN NULL WHEN c4 >= tau4 THEN 4 WHEN c3 >= tau3 THEN 3 WHEN c2 >= tau2 THEN 2 ELSE 1 END AS tier
    FROM cumulated
)
SELECT pair_id, query, product_id, locale, tier,
       CASE tier WHEN 4 THEN 'Excellent' WHEN 3 THEN 'Related' WHEN 2 THEN 'Mismatch' WHEN 1 THEN 'Irrelevant' END AS tier_name,
       p_excellent, p_related, p_mismatch, p_irrelevant, outcome, stale, segment, version, model_id, prompt_id
FROM tiered
