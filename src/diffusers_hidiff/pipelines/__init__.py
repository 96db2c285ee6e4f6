"""HIDiffPipeline."""
