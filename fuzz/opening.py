"""The first shapes of every stream: all pairs of values that can stand together, in 52 shapes.

48 is the least that there can be (eight types with six page sizes). Found by simulated annealing from the shapes that
`fuzz.stream` draws, which take 55 to 60: each is a compilation of two seconds. Of those that hold all pairs it seeks
cheap ones, values used alike often, and many without both cap and sinks, where most shows. The first nine stand at
the head of the stream, the others follow in an order of the seed's.
"""

FIRST = 9  # switched full of options, since an option that is off can hide no bug; the deep one sees every key

# types, page, kv heads, group, head size, window, cap, sinks, tier, scale, lse; "-" is none, or not
ROWS = """
f32            4-8   2 3,5-7       8 few   5 sinks small  odd     -
bf16             3 3-8     2    3,20 none  - -     small  default lse
f32            4-8   1     4       8 none  - -     deep   default -
f32         64-128   2     2       8 page 30 sinks medium unit    lse
f16            4-8 3-8     1  72-112 one   - sinks small  default -
f32              1   2 3,5-7    3,20 none  5 -     wide   default -
bf16            16   1     2       8 few   - -     long   default lse
int8           4-8   2     2 192-256 none 30 sinks small  default -
f32             32   1     2       8 wide  5 sinks long   default lse
e4m3            16 3-8     1     128 wide  - -     medium odd     lse
f16             32   2  8-16    3,20 page 30 -     long   unit    -
bf16            32   1  8-16      64 one  30 sinks medium odd     lse
bf16_as_f32      1 3-8     1       8 over 30 -     deep   default lse
f32_as_bf16 64-128   1 3,5-7     128 none  5 sinks medium unit    -
e5m2        64-128   2     2      64 few   - -     wide   unit    lse
bf16             1   2     1  72-112 wide  5 sinks deep   unit    -
int8             3   1 3,5-7      64 page  5 sinks deep   default lse
e5m2            16   2 3,5-7  72-112 over  5 sinks small  default -
e4m3        64-128 3-8  8-16       8 one   5 sinks wide   default -
e5m2           4-8 3-8     4    3,20 wide  5 sinks deep   odd     lse
bf16_as_f32    4-8   2     4  72-112 page  - -     small  unit    -
f32_as_bf16     16 3-8  8-16    3,20 page  - -     wide   unit    lse
e5m2             1   1     4     128 one   - -     medium default lse
f16              3   1     2     128 few   5 -     deep   odd     -
int8            32 3-8     4       8 few   - -     wide   unit    -
bf16        64-128   1     4 192-256 over 30 sinks small  odd     -
f32_as_bf16    4-8   2     1  72-112 few  30 -     medium odd     lse
e4m3             1   2     2 192-256 few   5 sinks small  unit    -
bf16_as_f32     16   1 3,5-7 192-256 one   - -     small  odd     -
e4m3            32   1 3,5-7  72-112 none  5 sinks wide   odd     -
bf16_as_f32      3   2     1      64 wide  5 sinks medium unit    lse
bf16           4-8   2     1     128 page 30 sinks wide   unit    lse
int8        64-128   1  8-16  72-112 wide 30 sinks small  unit    lse
f32             16   1     1      64 none  - -     long   default lse
e5m2            32   2     1 192-256 page 30 sinks small  unit    -
e4m3             3 3-8     1    3,20 over 30 -     deep   unit    -
int8             1   1  8-16    3,20 one   - -     deep   odd     lse
f32            4-8   1  8-16     128 over  - -     small  default lse
f16             16   1     4       8 over 30 sinks long   odd     lse
f16              1   1 3,5-7      64 wide  5 sinks wide   unit    -
f32_as_bf16     32   2     2      64 over 30 sinks wide   default lse
e4m3           4-8 3-8     4      64 page  - -     small  odd     lse
bf16_as_f32 64-128 3-8  8-16    3,20 few   - -     medium odd     lse
e5m2             3 3-8  8-16       8 none 30 -     wide   default -
f32              3 3-8     2  72-112 one   5 sinks small  default -
f32_as_bf16      1   2     4       8 one   - -     deep   unit    -
int8            16   2     1     128 over 30 sinks medium odd     lse
f32_as_bf16      3 3-8     1 192-256 wide  5 sinks small  default -
bf16        64-128 3-8 3,5-7    3,20 one  30 sinks long   odd     lse
bf16_as_f32     32   1     2     128 none  - -     wide   odd     -
f16         64-128   1     1 192-256 none  - -     medium odd     -
f32              3   1     4 192-256 few   - -     small  unit    lse
"""
