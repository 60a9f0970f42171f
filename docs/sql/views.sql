-- The tables as people ask them, over the files that `tapio-server archive export` and `archive.remote.parquet` write. DuckDB and
-- DataFusion read it as it stands. docs/sql/tapio_sql.py makes <table>_files before, one for each folder.

-- Frames that a node sent to two servers are in the files of both. The first copy counts: this lists the others.
CREATE OR REPLACE VIEW moved AS
SELECT cluster, node_id, epoch, segment, first_seq, least(seq, covered) AS last_seq
FROM (
  SELECT cluster, node_id, epoch, segment, first_seq, seq,
         max(seq) OVER (PARTITION BY cluster, node_id, epoch ORDER BY first_seq, seq, segment
                        ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS covered
  FROM (SELECT DISTINCT cluster, node_id, epoch, segment, first_seq, seq FROM ledger_files WHERE account = 'archived') AS stretches
) AS ordered
WHERE covered >= first_seq;

-- Every event once. `id` is what findings name as evidence.
CREATE OR REPLACE VIEW events AS
SELECT e.*, concat(e.node_id, ':', e.epoch, ':', CAST(e.seq AS VARCHAR), ':', CAST(e.idx AS VARCHAR)) AS id
FROM events_files AS e
WHERE NOT EXISTS (
  SELECT 1 FROM moved AS m
  WHERE m.segment = e.segment AND m.node_id = e.node_id AND m.epoch = e.epoch AND e.seq BETWEEN m.first_seq AND m.last_seq
);

CREATE OR REPLACE VIEW deaths AS
SELECT d.* FROM deaths_files AS d
WHERE NOT EXISTS (
  SELECT 1 FROM moved AS m
  WHERE m.segment = d.segment AND m.node_id = d.node_id AND m.epoch = d.epoch AND d.seq BETWEEN m.first_seq AND m.last_seq
);

CREATE OR REPLACE VIEW curves AS
SELECT c.* FROM curves_files AS c
WHERE NOT EXISTS (
  SELECT 1 FROM moved AS m
  WHERE m.segment = c.segment AND m.node_id = c.node_id AND m.epoch = c.epoch AND c.seq BETWEEN m.first_seq AND m.last_seq
);

-- Each finding as it was said last; what was withdrawn is gone.
CREATE OR REPLACE VIEW findings AS
SELECT * FROM (
  SELECT f.*, row_number() OVER (PARTITION BY f.cluster, f.id ORDER BY f.revision DESC, f.published_at DESC) AS nth
  FROM findings_files AS f
) AS revisions
WHERE nth = 1 AND NOT withdrawn;

-- What the collectors count goes on when a node moves to another server: `events` is what came since the statement before, by
-- whichever server. Of archived frames that an earlier stretch covers too, in another server's file, only those behind it count:
-- what was shipped by the end of this stretch less what was shipped by the end of those before it.
CREATE OR REPLACE VIEW ledger AS
SELECT cluster, "time", "until", node, source, account, stage, reason,
       CASE WHEN account IN ('emitted', 'shipped', 'dropped')
            THEN total - coalesce(lag(total) OVER (PARTITION BY cluster, node_id, epoch, source, account, stage, reason
                                                   ORDER BY seq, "until"), total - events)
            WHEN account = 'archived' AND covered >= first_seq
            THEN least(events, greatest(0, coalesce(shipped - shipped_before, events)))
            ELSE events END AS events,
       node_id, epoch, first_seq, seq, server, segment
FROM (
  SELECT s.*,
         max(seq) OVER (PARTITION BY cluster, node_id, epoch, source, account ORDER BY first_seq, seq, segment
                        ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS covered,
         max(shipped) OVER (PARTITION BY cluster, node_id, epoch, source, account ORDER BY first_seq, seq, segment
                            ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS shipped_before
  FROM (
    SELECT f.*, max(CASE WHEN account = 'shipped' THEN total END)
                  OVER (PARTITION BY cluster, node_id, epoch, source, segment, seq) AS shipped
    FROM ledger_files AS f
  ) AS s
) AS stretches;

-- What is missing. `is_wanted` marks what the configuration leaves out of the bulk lane: no death, and nothing that explains one.
CREATE OR REPLACE VIEW losses AS
SELECT cluster, "time", "until", node, source, account, stage, reason, events,
       coalesce(reason IN ('sampled', 'rate_limited', 'excluded'), false) AS is_wanted
FROM ledger
WHERE account IN ('dropped', 'unexplained', 'damaged') AND events <> 0;
