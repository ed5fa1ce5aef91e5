"""How many tokens a CPU works on at a time, so that what is between two products stays near the cores."""

# not a power of two: the copy that ends a chunk reads with a stride of a digit times the chunk, and strides that are
# powers of two fall on few cache sets; at width 1024, 128 tokens take 1.4 times as long as 136. On two cores 136 take 1.05
# to 1.2 times as long for monarch and low rank; from 256 on, monarch alone takes 1.4 to 1.8 times as long at width 8192
CHUNK_TOKENS = 232
