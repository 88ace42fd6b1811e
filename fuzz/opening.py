"""The first shapes of every stream: all pairs of values that can stand together, in 51 shapes.

48 is the least that there can be (eight types with six page sizes). Found by simulated annealing from the shapes that
`fuzz.stream` draws, which take 55 to 58: each is a compilation of two seconds. The first nine stand at the head of the
stream, the others follow in an order of the seed's.
"""

FIRST = 9  # switched full of options, since an option that is off can hide no bug; the deep one sees every key

# types, page, kv heads, group, head size, window, cap, sinks, tier, scale, lse; "-" is none, or not
ROWS = """
f32          4 2 3   8 few   5 sinks small  odd     -
bf16         3 3 2  20 none  - -     small  default lse
f32          8 1 4   8 none  - -     deep   default -
f32         16 2 2   8 page 30 sinks medium unit    lse
f16          4 3 1  72 one   - sinks small  default -
f32          1 2 2   3 none  5 -     wide   default -
bf16_as_f32 16 1 2   8 few   - -     long   default lse
int8         8 2 2  64 none 30 sinks medium default -
f32         32 1 2   8 wide  5 sinks long   default lse
bf16_as_f32 32 1 3  72 over 30 -     medium odd     lse
f16          8 3 8   3 over  - -     wide   unit    lse
f32_as_bf16  3 3 4   3 wide 30 -     wide   odd     lse
bf16_as_f32  8 2 1 128 wide  5 sinks small  unit    -
e5m2         1 3 1  20 over 30 sinks deep   default lse
bf16         1 1 3 128 one   - sinks medium odd     lse
f16         32 2 1  20 page 30 -     long   odd     -
e4m3         4 3 2  64 over 30 -     small  odd     lse
f32_as_bf16  8 3 8  20 one   5 sinks medium default -
int8         4 1 3  20 page  - sinks deep   unit    lse
bf16        32 3 4   3 few   5 -     long   unit    -
e5m2         3 2 2   8 one  30 -     deep   odd     -
int8        16 2 4 128 over  - -     small  odd     lse
e5m2        32 2 8  64 none  - sinks small  unit    -
e4m3         3 3 4   3 page  5 sinks small  odd     -
f32_as_bf16  1 1 3  64 few   5 -     deep   odd     lse
e4m3        16 2 3  20 wide  5 -     wide   odd     lse
int8         1 1 8  72 wide 30 -     small  odd     lse
e5m2         4 1 1 128 wide  - -     wide   default lse
int8         3 3 3   8 few   5 sinks wide   odd     -
e4m3         8 1 3  72 few   - sinks deep   default lse
f32          3 1 2  72 over  5 -     wide   unit    lse
e4m3         1 2 1   8 one   - -     medium unit    lse
e5m2        16 2 3   3 few   5 sinks medium odd     -
bf16_as_f32  4 1 8   3 none  5 -     deep   unit    lse
f32_as_bf16 16 3 1  72 none  5 -     small  default lse
f16          3 2 4  64 wide 30 sinks medium unit    lse
bf16        16 1 8   8 over 30 -     long   unit    lse
f16          1 1 2 128 few   5 -     deep   default lse
bf16_as_f32  1 3 4  20 one  30 sinks wide   default lse
bf16         8 2 1  72 wide  - -     deep   odd     -
bf16         4 1 4  64 page  - -     wide   default lse
f32         16 1 1  64 one   - -     long   default -
f32_as_bf16 32 2 2 128 page 30 sinks medium unit    lse
int8        32 1 1   3 one   - -     wide   default -
f16         16 2 3   8 none 30 sinks long   unit    lse
e4m3        32 1 8 128 none  5 sinks small  odd     lse
f32          3 3 1 128 few  30 -     small  unit    -
e5m2         8 3 4  72 page  - -     small  unit    -
f32_as_bf16  4 3 8   8 over  - -     medium unit    -
bf16_as_f32  3 2 8  64 page  - -     small  odd     -
f32          4 1 8  20 few  30 -     medium default lse
"""
