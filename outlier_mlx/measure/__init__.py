"""What a model does and costs: perplexity, scores, speed, routing, alphas, outlier features."""
