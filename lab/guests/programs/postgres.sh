# PostgreSQL with pgbench: processes that share memory, semaphores, signals, a journal; the sums must agree.
#
# packages: postgresql postgresql-contrib
# user: postgres
# memory: 1G
# limit: 180
cd /tmp
bin=$(echo /usr/lib/postgresql/*/bin)
mkdir data run
"$bin/initdb" --no-sync --auth=trust -D data >log 2>&1 || { cat log; exit 1; }
cat >>data/postgresql.conf <<'CONF'
listen_addresses = ''
unix_socket_directories = '/tmp/run'
shared_buffers = 64MB
CONF
"$bin/pg_ctl" -w -D data -l server.log start >/dev/null || { cat server.log; exit 1; }
export PGHOST=/tmp/run
createdb bench
pgbench -q -i -s 2 bench 2>/dev/null
pgbench -n -c 4 -j 2 -t 250 bench 2>/dev/null | tee -a /tmp/figures | grep -E 'transactions actually|failed'
pgbench -n -S -c 2 -t 1000 bench 2>/dev/null | tee -a /tmp/figures | grep -E 'transactions actually|failed'
# How fast it was is for whoever looks, not compared. /dev/stderr may not be opened by this user.
cat /tmp/figures >&2
psql -qAt bench <<'SQL'
select count(*) from pgbench_accounts;
select count(*) from pgbench_history;
select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history),
       (select sum(tbalance) from pgbench_tellers) = (select sum(bbalance) from pgbench_branches);
create table numbers as select i, md5(i::text) as hash, (i * 7919) % 1000 as key, sqrt(i) as root from generate_series(1, 50000) i;
create index on numbers (hash);
analyze numbers;
select count(*), sum(key), round(sum(root)::numeric, 6), min(hash), max(hash) from numbers;
select a.key, count(*) from numbers a join numbers b on a.hash = b.hash where a.i < 5000 group by 1 order by 2 desc, 1 limit 3;
select sum(n) from (with recursive f(a, b) as (values (0::numeric, 1::numeric) union all select b, a + b from f where b < 1e40) select a as n from f) x;
select jsonb_agg(x order by x)::text from (select key as x from numbers limit 0) y;
do $$ declare s bigint := 0; begin for i in 1..200000 loop s := s + i % 13; end loop; raise notice '%', s; end $$;
SQL
"$bin/pg_ctl" -w -D data -m fast stop >/dev/null && echo stopped
grep -E 'PANIC|FATAL|crash|signal' server.log || true
