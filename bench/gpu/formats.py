"""Names that cross from the session into vLLM, kept where nothing heavy is imported."""

LOAD_FORMAT = "pdserve_made_up"
OURS = "bench.gpu.weights.MadeUpWeights"
PLAIN = "bench.gpu.weights.PlainMadeUpWeights"
