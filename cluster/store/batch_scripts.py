"""What the store does with batch jobs in one step; `cluster.store.batches` says what lies where."""

# KEYS: job, index, stored bytes, active, pages, lines, errors, done, unfinished. ARGV: id, name,
# created at, pages, bytes, the most bytes, the most unfinished jobs, then the job's fields.
# 0: there is no room; -1: the tenant has so many.
ADD = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 1 end
local refused
if (tonumber(redis.call('GET', KEYS[3])) or 0) + ARGV[5] > tonumber(ARGV[6]) then refused = 0 end
if redis.call('SCARD', KEYS[9]) >= tonumber(ARGV[7]) then refused = -1 end
if refused then
  redis.call('DEL', KEYS[6], KEYS[7], KEYS[8])
  return refused
end
redis.call('HSET', KEYS[1], unpack(ARGV, 8))
redis.call('INCRBY', KEYS[3], ARGV[5])
redis.call('SADD', KEYS[9], ARGV[1])
for page = 0, ARGV[4] - 1 do redis.call('ZADD', KEYS[5], 0, page) end
for i = 6, 8 do redis.call('PERSIST', KEYS[i]) end
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[1])
redis.call('ZADD', KEYS[4], ARGV[3], ARGV[2])
return 1
"""

# KEYS: pages, owners, done, job. ARGV: owner, now, lease end, page lines, total. The next free page
# and its open lines; nothing if there is none.
CLAIM = """
if redis.call('HGET', KEYS[4], 'state') ~= 'in_progress' then return {} end
local page = redis.call('ZRANGE', KEYS[1], '-inf', ARGV[2], 'BYSCORE', 'LIMIT', 0, 1)[1]
if not page then return {} end
redis.call('ZADD', KEYS[1], ARGV[3], page)
redis.call('HSET', KEYS[2], page, ARGV[1])
local open = {page}
local first = page * ARGV[4]
for line = first, math.min(first + ARGV[4], ARGV[5]) - 1 do
  if redis.call('GETBIT', KEYS[3], line) == 0 then open[#open + 1] = line end
end
return open
"""

# KEYS: pages, owners. ARGV: owner, lease end, pages. Those that are the owner's still.
RENEW = """
local mine = {}
for i = 3, #ARGV do
  if redis.call('HGET', KEYS[2], ARGV[i]) == ARGV[1] then
    redis.call('ZADD', KEYS[1], 'XX', ARGV[2], ARGV[i])
    mine[#mine + 1] = ARGV[i]
  end
end
return mine
"""

# KEYS: done, results of the kind, job, stored bytes. ARGV: line, result, counter.
RESULT = """
local state = redis.call('HGET', KEYS[3], 'state')
if state ~= 'in_progress' and state ~= 'cancelling' then return 0 end
if redis.call('SETBIT', KEYS[1], ARGV[1], 1) == 1 then return 0 end
redis.call('RPUSH', KEYS[2], ARGV[2])
redis.call('HINCRBY', KEYS[3], ARGV[3], 1)
redis.call('HINCRBY', KEYS[3], 'bytes', #ARGV[2])
redis.call('INCRBY', KEYS[4], #ARGV[2])
return 1
"""

# KEYS: pages, owners, job, lines, done, active, ended, unfinished. ARGV: owner, page (or -1), now,
# name, done, id. A page is done, or given back; the job ends with its last page, or, cancelled,
# with the last that is leased.
SETTLE = """
if tonumber(ARGV[2]) >= 0 and redis.call('HGET', KEYS[2], ARGV[2]) == ARGV[1] then
  redis.call('HDEL', KEYS[2], ARGV[2])
  if ARGV[5] == '1' then redis.call('ZREM', KEYS[1], ARGV[2])
  else redis.call('ZADD', KEYS[1], 'XX', 0, ARGV[2]) end
end
local state, final = unpack(redis.call('HMGET', KEYS[3], 'state', 'final'))
if state == 'cancelling' then redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[3]) end
if (state == 'in_progress' or state == 'cancelling') and redis.call('ZCARD', KEYS[1]) == 0 then
  local ended = state == 'cancelling' and final or 'completed'
  redis.call('HSET', KEYS[3], 'state', ended, 'ended_at', ARGV[3])
  redis.call('DEL', KEYS[1], KEYS[2], KEYS[4], KEYS[5])
  redis.call('ZREM', KEYS[6], ARGV[4])
  redis.call('SREM', KEYS[8], ARGV[6])
  redis.call('ZADD', KEYS[7], ARGV[3], ARGV[4])
  return 1
end
return 0
"""

# KEYS: index, ended, stored bytes, job, then the rest of it. ARGV: id, name. Counted out once,
# however often it is called.
DROP = """
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[2])
local size = redis.call('HGET', KEYS[4], 'bytes')
if not size then return 0 end
redis.call('DECRBY', KEYS[3], size)
redis.call('DEL', unpack(KEYS, 4))
return 1
"""

# KEYS: job. ARGV: final state.
CANCEL = """
if redis.call('HGET', KEYS[1], 'state') ~= 'in_progress' then return 0 end
redis.call('HSET', KEYS[1], 'state', 'cancelling', 'final', ARGV[1])
return 1
"""
