"""The pdserve wire schema."""
