// Player of the last recording: its waveform, a bar for each segment of the transcript, and playback of one segment.

export function createPlayer() {
  const WAVEFORM_HEIGHT = 64
  const find = selector => document.querySelector(selector)
  const audio = () => find("#player audio")
  const segments = () => [...document.querySelectorAll("#details li[data-start]")]
  let objectUrl = null
  let stopAt = null // seconds
  let loadCount = 0

  const drawWaveform = (canvas, samples) => {
    const ratio = window.devicePixelRatio || 1
    canvas.width = canvas.clientWidth * ratio
    canvas.height = WAVEFORM_HEIGHT * ratio
    const context = canvas.getContext("2d")
    const nBars = Math.max(1, Math.floor(canvas.clientWidth / 3))
    const samplesPerBar = Math.max(1, Math.floor(samples.length / nBars))
    const peaks = []
    for (let i = 0; i < nBars; i++) {
      let peak = 0
      for (const sample of samples.subarray(i * samplesPerBar, (i + 1) * samplesPerBar))
        peak = Math.max(peak, Math.abs(sample))
      peaks.push(peak)
    }
    const loudest = Math.max(0.01, ...peaks)
    context.fillStyle = "#64748b"
    peaks.forEach((peak, i) => {
      const height = Math.max(2, (peak / loudest) * 60) * ratio
      context.fillRect(i * 3 * ratio, (canvas.height - height) / 2, 2 * ratio, height)
    })
  }

  const drawSegments = () => {
    const bars = find("#player .parts")
    if (!bars) return
    bars.replaceChildren()
    const duration = audio()?.duration
    const isReady = Number.isFinite(duration) && duration > 0
    find("#details")?.classList.toggle("playable", isReady)
    if (!isReady) return
    for (const segment of segments()) {
      const bar = document.createElement("div")
      const start = Number(segment.dataset.start)
      const end = Number(segment.dataset.end)
      bar.style.left = `${(100 * start) / duration}%`
      bar.style.width = `${Math.max(0, (100 * (Math.min(end, duration) - start)) / duration)}%`
      bar.title = segment.querySelector("time").textContent
      bar.onclick = () => play(start, end)
      bars.append(bar)
    }
  }

  const hasUndrawnSegments = () => segments().length !== (find("#player .parts")?.children.length ?? 0)

  const play = (start, end) => {
    const player = audio()
    if (!player?.src) return
    player.currentTime = start
    stopAt = end
    player.play()
  }

  const playSegment = segment => play(Number(segment.dataset.start), Number(segment.dataset.end))

  const highlightCurrentSegment = () => {
    const time = audio().currentTime
    const bars = find("#player .parts").children
    if (stopAt !== null && time >= stopAt) {
      audio().pause()
      stopAt = null
    }
    segments().forEach((segment, i) => {
      const isCurrent = time >= Number(segment.dataset.start) && time < Number(segment.dataset.end) && !audio().paused
      segment.classList.toggle("now", isCurrent)
      bars[i]?.classList.toggle("now", isCurrent)
    })
  }

  const clear = () => {
    loadCount++
    if (objectUrl) URL.revokeObjectURL(objectUrl)
    objectUrl = stopAt = null
    const figure = find("#player figure")
    if (!figure) return
    figure.hidden = true
    audio().removeAttribute("src")
    audio().load()
    drawSegments()
  }

  const load = async url => {
    clear()
    if (!url) return
    const current = loadCount // a newer call makes this one stale
    try {
      const blob = await (await fetch(url)).blob()
      if (current !== loadCount) return
      objectUrl = URL.createObjectURL(blob)
      const player = audio()
      player.src = objectUrl
      player.ondurationchange = drawSegments
      player.ontimeupdate = player.onpause = player.onplay = highlightCurrentSegment
      player.onended = () => {
        stopAt = null
        highlightCurrentSegment()
      }
      const context = new OfflineAudioContext(1, 1, 16000)
      const decoded = await context.decodeAudioData(await blob.arrayBuffer())
      if (current !== loadCount) return
      find("#player figure").hidden = false
      drawWaveform(find("#player canvas"), decoded.getChannelData(0))
      drawSegments()
    } catch (_error) {
      if (current === loadCount) clear() // the browser cannot play this format; the transcript remains
    }
  }

  return { load, playSegment, drawSegments, hasUndrawnSegments }
}
