"""Numbers about images, detections and sets of generated scans."""
