"""What a training looks at: drawn, read, warped, degraded."""
