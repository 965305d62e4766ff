"""What an encoder learned: features extracted once, scored beside floors."""
