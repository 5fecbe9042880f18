"""What reads run folders: results, tables and figures of them, and measurements on them."""
