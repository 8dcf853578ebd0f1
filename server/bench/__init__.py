"""`trimtab bench`: what steering costs, against vLLM as it comes, in pairs of rounds on the same machine."""
