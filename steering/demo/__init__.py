"""The demo model: a toy chat model trained here, deliberately over-refusing, with its measurements and card."""
