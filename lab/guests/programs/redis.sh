# Redis with redis-benchmark: sockets, an event loop, fork for a snapshot; what it holds in the end must agree.
#
# packages: redis-server redis-tools
# memory: 512M
# limit: 90
mkdir -p /tmp/redis
cd /tmp/redis
redis-server --port 0 --unixsocket /tmp/redis/socket --save '' --appendonly no --dir /tmp/redis --logfile log --daemonize yes >/dev/null
cli() { redis-cli -s /tmp/redis/socket "$@"; }
for i in 1 2 3 4 5 6 7 8 9 10; do
    [ "$(cli ping 2>/dev/null)" = PONG ] && break
    sleep 0.5
done
redis-benchmark -s /tmp/redis/socket -q -n 10000 -c 20 -t set,get,incr,lpush,rpush,lpop,sadd,hset,spop,zadd,mset | tr '\r' '\n' | grep requests >&2
redis-benchmark -s /tmp/redis/socket -q -n 50000 -P 16 -c 10 -t incr,lpush | tr '\r' '\n' | grep requests >&2
echo "counter $(cli get counter:__rand_int__), list $(cli llen mylist)"
cli flushall
cli eval "for i = 1, 30000 do redis.call('set', 'key:' .. i, string.rep(i, 3)); redis.call('zadd', 'order', math.sin(i), i) end; return redis.call('dbsize')" 0
cli zrange order 0 4
cli zscore order 12345
cli debug digest
cli bgsave
for i in $(seq 100); do
    cli info persistence | grep -q 'rdb_bgsave_in_progress:0' && break
    sleep 0.1
done
cli info persistence | grep rdb_last_bgsave_status | tr -d '\r'
redis-check-rdb dump.rdb | tail -n 1 | sed 's/^\[[^]]*\] //'
cli shutdown nosave
