"""What every process of the launcher needs: how it prints, how it ends, how it starts others."""
