// Runs in the audio thread: collects the microphone's samples as int16 and posts them in chunks.

registerProcessor(
  "chunks",
  class extends AudioWorkletProcessor {
    constructor({ processorOptions }) {
      super()
      this.chunk = new Int16Array(processorOptions.chunkSamples)
      this.n = 0
    }

    process([[channel]]) {
      for (const sample of channel ?? []) {
        this.chunk[this.n++] = Math.max(-32768, Math.min(32767, Math.round(sample * 32768)))
        if (this.n === this.chunk.length) {
          this.port.postMessage(this.chunk.slice())
          this.n = 0
        }
      }
      return true
    }
  }
)
