"""The numbers behind figures of a delta: small arrays, whatever the delta's size. No torch."""
