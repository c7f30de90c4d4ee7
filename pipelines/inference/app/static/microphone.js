// Live transcription of an open microphone.
//
// The page stores all samples and sends what is new as soon as the previous response has arrived. If the server or the
// network is slow or unavailable, the samples wait here and nothing is lost: every request states the offset of its
// first sample, every response how many samples the server has received.

export function createMicrophone({ player, message, explain, workletSource, settings }) {
  const CHUNK_SAMPLES = 1024
  const MAX_REQUEST_S = 10
  const MAX_REQUEST_SAMPLES = 480000
  const MIN_REQUEST_S = 0.5
  const find = selector => document.querySelector(selector)
  let session = null // of the open microphone
  let opening = null

  // Two clicks open one microphone.
  const start = options => {
    if (session) return true
    opening ??= open(options).finally(() => {
      opening = null
    })
    return opening
  }

  const open = async options => {
    player.load(null)
    let stream = null
    showStatus("")
    try {
      stream = await navigator.mediaDevices.getUserMedia({ audio: true })
      const context = new AudioContext()
      const node = await createRecorderNode(context)
      const current = {
        stream,
        context,
        rate: context.sampleRate,
        chunks: [],
        nSent: 0, // chunks that the server has
        id: randomId(),
        options, // prompt, hotwords and beams as they are now
        failures: 0
      }
      session = current
      document.body.classList.add("listening")
      find("#live-text").replaceChildren()
      showStatus("")
      node.port.onmessage = event => addChunk(current, event.data)
      context.createMediaStreamSource(stream).connect(node)
      for (const track of stream.getTracks()) track.addEventListener("ended", () => loseMicrophone(current))
      if (context.state !== "running") context.resume() // Safari starts it suspended
      return true
    } catch (error) {
      stopTracks(stream)
      showStatus(explain(error))
      return false
    }
  }

  const createRecorderNode = async context => {
    const url = URL.createObjectURL(new Blob([workletSource], { type: "text/javascript" }))
    await context.audioWorklet.addModule(url)
    URL.revokeObjectURL(url)
    return new AudioWorkletNode(context, "chunks", {
      numberOfOutputs: 0,
      channelCount: 1,
      channelCountMode: "explicit",
      processorOptions: { chunkSamples: CHUNK_SAMPLES }
    })
  }

  const randomId = () => Array.from(crypto.getRandomValues(new Uint32Array(4)), n => n.toString(36)).join("-")

  const addChunk = (current, chunk) => {
    if (current.closed) return
    current.chunks.push(chunk)
    current.newestAt = performance.now()
    current.full = (current.chunks.length + 1) * CHUNK_SAMPLES > settings.maxDurationS * current.rate
    if (current.full) close(current)
    sendNext(current)
  }

  // The device was unplugged, or its permission was withdrawn: what was said until then is transcribed.
  const loseMicrophone = current => {
    if (current.closed) return
    current.lost = true
    close(current)
    current.wake?.()
    showStatus(message("microphone_lost"))
    sendNext(current)
  }

  const showStatus = text => {
    const status = find("#live-note")
    if (status && status.textContent !== text) status.textContent = text
  }

  // Chunks per request: ten seconds, or fewer if the sample rate is unusually high.
  const maxChunks = rate => Math.floor(Math.min(MAX_REQUEST_S * rate, MAX_REQUEST_SAMPLES) / CHUNK_SAMPLES)

  // Sends the next samples, one request at a time.
  const sendNext = async current => {
    if (current.busy || current.done) return
    const nWaiting = current.chunks.length - current.nSent
    if (!current.closed && (nWaiting * CHUNK_SAMPLES) / current.rate < MIN_REQUEST_S) return
    if (current.closed && !current.loaded) {
      current.loaded = true
      player.load(URL.createObjectURL(encodeWav(current)))
    }
    current.busy = true
    const newestAt = current.newestAt
    const isLast = Boolean(current.closed) && nWaiting <= maxChunks(current.rate)
    const response = await post(current, isLast)
    if (current.done) return
    if (response.taken !== undefined) {
      current.failures = 0
      current.nSent = Math.floor(response.taken / CHUNK_SAMPLES)
      showStatus(current.lost ? message("microphone_lost") : "")
      showText(response.told, newestAt)
      if (response.ended) {
        requestTranscript(current)
        return
      }
    } else if (["no_recording", "silent", "options"].includes(response.reason)) {
      finish(current)
      showStatus(response.detail)
      return
    } else {
      await waitAfterFailure(current, response)
    }
    current.busy = false
    sendNext(current)
  }

  const post = async (current, last) => {
    let bytes = ""
    for (const chunk of current.chunks.slice(current.nSent, current.nSent + maxChunks(current.rate)))
      bytes += String.fromCharCode(...new Uint8Array(chunk.buffer))
    const request = {
      talk: current.id,
      start: current.nSent * CHUNK_SAMPLES,
      rate: current.rate,
      samples: btoa(bytes),
      last,
      options: current.nSent ? undefined : current.options,
      language: document.documentElement.lang
    }
    try {
      const response = await fetch(`${window.gradio_config?.root ?? ""}/live`, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(request),
        signal: AbortSignal.timeout(settings.requestTimeoutMs)
      })
      return await response.json()
    } catch (_error) {
      return { reason: "lost", detail: message("lost") }
    }
  }

  const showText = (html, newestAt) => {
    find("#live-text").innerHTML = html // the server has escaped the transcript
    const latency = find("#live small b")
    if (latency) latency.textContent = ((performance.now() - newestAt) / 1000).toFixed(1)
  }

  // The same samples are sent again after a pause that doubles, or as soon as the network is back.
  const waitAfterFailure = async (current, response) => {
    if (response.reason === "too_long") {
      current.chunks.length = current.nSent
      if (!current.closed) {
        close(current)
        return
      }
    }
    current.failures++
    showStatus(`${response.detail} ${message(current.closed ? "waiting_closed" : "waiting")}`)
    const pauseMs = Math.min(10, 2 ** (current.failures - 1)) * 1000
    await new Promise(resolve => {
      current.wake = resolve
      setTimeout(resolve, pauseMs)
    })
  }

  // The server has all samples: Gradio fetches the transcript.
  const requestTranscript = current => {
    current.collecting = true
    find("#live-end").click()
  }

  const transcriptReceived = success => {
    const current = session
    if (!current?.collecting) return
    if (success) {
      finish(current)
      showStatus(current.full ? message("full") : current.lost ? message("microphone_lost") : "")
      return
    }
    current.collecting = false // ask the server again whether it has all samples
    setTimeout(() => {
      current.busy = false
      sendNext(current)
    }, 2000)
  }

  const stopTracks = stream => {
    for (const track of stream?.getTracks() ?? []) track.stop()
  }

  const close = current => {
    current.closed = true
    stopTracks(current.stream)
    if (current.context.state !== "closed") current.context.close()
  }

  // The first click closes the microphone and sends the rest; the second one does not wait for that.
  const stop = () => {
    const current = session
    if (!current) return
    if (!current.closed) {
      close(current)
      current.wake?.()
      sendNext(current)
      return
    }
    finish(current)
    showStatus(message("given_up"))
  }

  const finish = current => {
    close(current)
    current.done = true
    if (session !== current) return
    session = null
    document.body.classList.remove("listening")
  }

  const encodeWav = ({ chunks, rate }) => {
    const header = new DataView(new ArrayBuffer(44))
    const nBytes = chunks.length * 2 * CHUNK_SAMPLES
    const writeText = (offset, text) => {
      for (let i = 0; i < text.length; i++) header.setUint8(offset + i, text.charCodeAt(i))
    }
    writeText(0, "RIFF")
    header.setUint32(4, 36 + nBytes, true)
    writeText(8, "WAVEfmt ")
    header.setUint32(16, 16, true) // bytes of the format block
    header.setUint16(20, 1, true) // PCM
    header.setUint16(22, 1, true) // mono
    header.setUint32(24, rate, true)
    header.setUint32(28, 2 * rate, true) // bytes per second
    header.setUint16(32, 2, true) // bytes per sample
    header.setUint16(34, 16, true) // bits per sample
    writeText(36, "data")
    header.setUint32(40, nBytes, true)
    return new Blob([header, ...chunks], { type: "audio/wav" })
  }

  window.addEventListener("online", () => session?.wake?.())
  window.addEventListener("beforeunload", event => {
    if (session) event.preventDefault()
  })

  return { start, stop, transcriptReceived, sessionId: () => session?.id ?? "" }
}
