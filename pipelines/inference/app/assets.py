"""How the page looks, and the little that it does in the browser. Nothing of it is fetched from elsewhere."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pipelines.inference.app import service as app_service
from pipelines.inference.app.i18n import WORDS

if TYPE_CHECKING:
    import gradio as gr


CSS = """
.gradio-container {max-width: 760px !important; margin: 0 auto !important}
#head h1 {font-size: 1.9rem; letter-spacing: -.01em; margin: .5rem 0 .2rem}
#head p, #privacy p, #stored p, #timing p, #card dt, #examples-label p, #live-hint p {color: var(--muted)}
#privacy p, #stored p, #timing p, #examples-label p, #live-hint p {font-size: .85rem; line-height: 1.45; margin: 0}
#language {max-width: 16rem; margin-left: auto}
#language .wrap {justify-content: flex-end}
#transcript textarea {font-size: 1.2rem; line-height: 1.55}
@supports (field-sizing: content) {#transcript textarea {field-sizing: content; height: auto !important}}
#live {min-height: 4.5rem; border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg)}
#live p {font-size: 1.2rem; line-height: 1.55; margin: 0; padding: .6rem .9rem .2rem}
#live p span, #live small {color: var(--muted)}
#live small {padding: 0 .9rem .5rem; display: block; font-variant-numeric: tabular-nums}
#card {border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); padding: .8rem 1rem}
#card dl {display: grid; grid-template-columns: 7rem 1fr; gap: .3rem .75rem; margin: 0; font-size: .85rem}
#card dd {margin: 0; overflow-wrap: anywhere}
#question h2 {font-size: 1.2rem; margin: .9rem 0 0}
#thanks:not(:has(p)), #compared:not(:has(dl)) {display: none}
#details summary {cursor: pointer; font-size: .9rem; color: var(--muted)}
#details ol {list-style: none; margin: .5rem 0 0; padding: 0; max-height: 22rem; overflow-y: auto}
#details li {display: grid; grid-template-columns: 4.5rem 1fr; gap: .75rem; padding: .2rem .3rem; line-height: 1.5}
#details li.now {background: var(--background-fill-secondary); border-radius: var(--radius-md)}
#details .play {font: inherit; font-size: .85rem; font-variant-numeric: tabular-nums; color: var(--link);
  text-align: left; background: none; border: 0; padding: 0 .2rem; cursor: pointer; text-decoration: underline;
  text-underline-offset: 3px}
#details:not(.playable) .play {color: var(--muted); text-decoration: none; cursor: default}
mark {background: none !important; color: inherit !important; text-decoration: underline wavy #b45309 !important;
  text-underline-offset: 3px}
#details p, #compared p {font-size: .85rem; color: var(--muted); margin: .4rem 0 0}
#compared h3 {font-size: 1rem; margin: .4rem 0}
#compared dl {display: grid; grid-template-columns: 1fr 1fr; gap: .3rem 1.25rem; margin: 0;
  grid-auto-flow: column; grid-template-rows: auto auto}
#compared dt {font-size: .85rem; color: var(--muted); overflow-wrap: anywhere}
#compared dd {margin: 0; line-height: 1.55}
#player figure {margin: .3rem 0}
#player canvas {width: 100%; height: 64px; display: block}
#player .parts {position: relative; height: 24px; margin: 2px 0 6px}
#player .parts div {position: absolute; height: 100%; background: #1d4ed8; opacity: .35; border-radius: 4px;
  cursor: pointer; min-width: 4px}
#player .parts div.now, #player .parts div:hover {opacity: .8}
#player audio {width: 100%; height: 40px}
#downloads button {font-size: .85rem}
button[role=tab].selected {color: var(--link) !important}
#recording time, #recording .playback span, footer button, footer a {color: var(--muted) !important}
#live-end, body.listening #speak, body:not(.listening) #stop, #live-note:empty {display: none}
#live p#live-note {font-size: .95rem; padding: .4rem .9rem .6rem}
#timing:not(:has(p)), #details:not(:has(details)), #player:not(:has(figure:not([hidden]))) {display: none}
#player:has(figure[hidden]) {position: absolute; visibility: hidden}
:root {--muted: #475569; --link: #1d4ed8}
.dark {--muted: #a8b5c7; --link: #93c5fd}
button:focus-visible, input:focus-visible, textarea:focus-visible, summary:focus-visible {
  outline: 3px solid var(--color-accent) !important; outline-offset: 1px
}
footer .divider {display: none !important}
@media (max-width: 480px) {
  #card dl {grid-template-columns: 5.5rem 1fr}
  #head h1 {font-size: 1.6rem}
  #compared dl {grid-template-columns: 1fr; grid-auto-flow: row; grid-template-rows: none}
}
"""

SCRIPT = """
() => {
  const find = selector => document.querySelector(selector)
  let address = null, until = null, number = 0
  const audio = () => find("#player audio")
  const parts = () => [...document.querySelectorAll("#details li[data-start]")]

  const drawn = (canvas, samples) => {
    const ratio = window.devicePixelRatio || 1
    canvas.width = canvas.clientWidth * ratio
    canvas.height = 64 * ratio
    const context = canvas.getContext("2d"), n = Math.max(1, Math.floor(canvas.clientWidth / 3))
    const each = Math.max(1, Math.floor(samples.length / n)), heights = []
    for (let i = 0; i < n; i++) {
      let peak = 0
      for (const sample of samples.subarray(i * each, (i + 1) * each)) peak = Math.max(peak, Math.abs(sample))
      heights.push(peak)
    }
    const loudest = Math.max(0.01, ...heights)
    context.fillStyle = "#64748b"
    heights.forEach((height, i) => {
      const pixels = Math.max(2, height / loudest * 60) * ratio
      context.fillRect(i * 3 * ratio, (canvas.height - pixels) / 2, 2 * ratio, pixels)
    })
  }

  const place = () => {
    const bars = find("#player .parts"), length = audio()?.duration
    if (!bars) return
    bars.replaceChildren()
    const ready = Number.isFinite(length) && length > 0
    find("#details")?.classList.toggle("playable", ready)
    if (!ready) return
    for (const part of parts()) {
      const bar = document.createElement("div")
      const start = Number(part.dataset.start), end = Number(part.dataset.end)
      bar.style.left = `${100 * start / length}%`
      bar.style.width = `${Math.max(0, 100 * (Math.min(end, length) - start) / length)}%`
      bar.title = part.querySelector("time").textContent
      bar.onclick = () => play(start, end)
      bars.append(bar)
    }
  }

  const play = (start, end) => {
    const player = audio()
    if (!player || !player.src) return
    player.currentTime = start
    until = end
    player.play()
  }

  const follow = () => {
    const now = audio().currentTime, bars = find("#player .parts").children
    if (until !== null && now >= until) { audio().pause(); until = null }
    parts().forEach((part, i) => {
      const here = now >= Number(part.dataset.start) && now < Number(part.dataset.end) && !audio().paused
      part.classList.toggle("now", here)
      bars[i]?.classList.toggle("now", here)
    })
  }

  const forget = () => {
    number++
    if (address) URL.revokeObjectURL(address)
    address = until = null
    const figure = find("#player figure")
    if (!figure) return
    figure.hidden = true
    audio().removeAttribute("src")
    audio().load()
    place()
  }

  const load = async url => {
    forget()
    if (!url) return
    const mine = number
    try {
      const blob = await (await fetch(url)).blob()
      if (mine !== number) return
      address = URL.createObjectURL(blob)
      const player = audio()
      player.src = address
      player.ondurationchange = place
      player.ontimeupdate = player.onpause = player.onplay = follow
      player.onended = () => { until = null; follow() }
      const context = new OfflineAudioContext(1, 1, 16000)
      const decoded = await context.decodeAudioData(await blob.arrayBuffer())
      if (mine !== number) return
      find("#player figure").hidden = false
      drawn(find("#player canvas"), decoded.getChannelData(0))
      place()
    } catch (error) {
      if (mine === number) forget()  // a format that this browser cannot play: the transcript stays
    }
  }

  const save = (files, ending) => {
    if (!files) return
    const link = document.createElement("a")
    link.href = URL.createObjectURL(new Blob([files[ending]], {type: "text/plain;charset=utf-8"}))
    link.download = `transcript.${ending}`
    link.click()
    setTimeout(() => URL.revokeObjectURL(link.href), 10000)
  }

  const speak = language => {
    document.documentElement.lang = language
    for (const named of document.querySelectorAll(`[data-label-${language}]`))
      named.setAttribute("aria-label", named.getAttribute(`data-label-${language}`))
  }

  // An open microphone. The page keeps all that it hears and sends what is new as soon as the last answer is there:
  // where server or network are slow or away the pieces wait, and nothing is lost. Every piece says where it begins,
  // every answer how much is there.
  const N = 1024  // samples that come at once
  const worklet = `registerProcessor("pieces", class extends AudioWorkletProcessor {
    constructor() { super(); this.held = new Int16Array(${N}); this.n = 0 }
    process([[channel]]) {
      for (const sample of channel ?? []) {
        this.held[this.n++] = Math.max(-32768, Math.min(32767, Math.round(sample * 32768)))
        if (this.n === this.held.length) { this.port.postMessage(this.held.slice()); this.n = 0 }
      }
      return true
    }
  })`
  let microphone = null, opening = null

  // two presses open one microphone
  const start = () => microphone ? true : opening ??= open().finally(() => { opening = null })

  const open = async () => {
    load(null)
    let stream = null
    try {
      stream = await navigator.mediaDevices.getUserMedia({audio: true})
      const context = new AudioContext()
      const module = URL.createObjectURL(new Blob([worklet], {type: "text/javascript"}))
      await context.audioWorklet.addModule(module)
      URL.revokeObjectURL(module)
      const mono = {numberOfOutputs: 0, channelCount: 1, channelCountMode: "explicit"}
      const node = new AudioWorkletNode(context, "pieces", mono)
      const mine = {stream, context, rate: context.sampleRate, all: [], sent: 0, talk: talkName(), failures: 0}
      microphone = mine
      document.body.classList.add("listening")
      find("#live-text").replaceChildren()
      note("")
      node.port.onmessage = event => {
        if (mine.closed) return
        mine.all.push(event.data)
        mine.newest = performance.now()
        mine.full = (mine.all.length + 1) * N > lab.longest_s * mine.rate
        if (mine.full) shut(mine)
        goOn(mine)
      }
      context.createMediaStreamSource(stream).connect(node)
      return true
    } catch (error) {
      stream?.getTracks().forEach(track => track.stop())
      return false
    }
  }

  const talkName = () => Array.from(crypto.getRandomValues(new Uint32Array(4)), n => n.toString(36)).join("-")
  const say = name => (WORDS[document.documentElement.lang] ?? WORDS.en)[name]
  const note = text => {
    const place = find("#live-note")
    if (place && place.textContent !== text) place.textContent = text
  }

  // how many chunks go at once: ten seconds of sound, or fewer where the microphone has more samples than usual
  const most = rate => Math.floor(Math.min(10 * rate, 480000) / N)

  // the next piece, or the last one; one request at a time
  const goOn = async mine => {
    if (mine.busy || mine.done) return
    const rest = (mine.all.length - mine.sent) * N / mine.rate
    if (!mine.closed && rest < 0.5) return
    if (mine.closed && !mine.loaded) {
      mine.loaded = true
      load(URL.createObjectURL(wav(mine)))
    }
    mine.busy = true
    const newest = mine.newest, told = await asked(mine, mine.closed && mine.all.length - mine.sent <= most(mine.rate))
    if (mine.done) return
    if (told.taken !== undefined) {
      mine.failures = 0
      mine.sent = Math.floor(told.taken / N)
      note("")
      heard(told.told, newest)
      if (told.ended) return collect(mine)
    } else if (["no_recording", "silent"].includes(told.reason)) {
      closed(mine)
      return note(told.detail)
    } else {
      await failed(mine, told)
    }
    mine.busy = false
    goOn(mine)
  }

  const asked = async (mine, last) => {
    const chunks = mine.all.slice(mine.sent, mine.sent + most(mine.rate))
    let letters = ""
    for (const chunk of chunks) letters += String.fromCharCode(...new Uint8Array(chunk.buffer))
    const piece = {talk: mine.talk, start: mine.sent * N, rate: mine.rate, samples: btoa(letters), last,
      language: document.documentElement.lang}
    try {
      const answer = await fetch(`${window.gradio_config?.root ?? ""}/live`, {
        method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(piece),
        signal: AbortSignal.timeout(lab.patience_ms)
      })
      return await answer.json()
    } catch (error) {
      return {reason: "lost", detail: say("lost")}
    }
  }

  const heard = (told, newest) => {
    find("#live-text").innerHTML = told  // the server has escaped what is no markup of its own
    const late = find("#live small b")
    if (late) late.textContent = ((performance.now() - newest) / 1000).toFixed(1)
  }

  // the sound stays here: the same once more, later and later, or as soon as the network is back
  const failed = async (mine, told) => {
    if (told.reason === "too_long") mine.all.length = mine.sent
    if (told.reason === "too_long" && !mine.closed) return shut(mine)
    mine.failures++
    note(`${told.detail} ${say(mine.closed ? "waiting_closed" : "waiting")}`)
    const pause = Math.min(10, 2 ** (mine.failures - 1)) * 1000
    await new Promise(done => { mine.wake = done; setTimeout(done, pause) })
  }
  window.addEventListener("online", () => microphone?.wake?.())

  // the server has all: Gradio fetches the transcript
  const collect = mine => {
    mine.collecting = true
    find("#live-end").click()
  }

  const collected = done => {
    const mine = microphone
    if (!mine?.collecting) return
    if (done) {
      closed(mine)
      return note(mine.full ? say("full") : "")
    }
    mine.collecting = false  // the server is asked once more whether it has all
    setTimeout(() => { mine.busy = false; goOn(mine) }, 2000)
  }

  const shut = mine => {
    mine.closed = true
    mine.stream.getTracks().forEach(track => track.stop())
    if (mine.context.state !== "closed") mine.context.close()
  }

  // the first press closes the microphone, and what is still here is sent; a second one waits no longer
  const stop = () => {
    const mine = microphone
    if (!mine) return
    if (!mine.closed) {
      shut(mine)
      mine.wake?.()
      return goOn(mine)
    }
    closed(mine)
    note(say("given_up"))
  }

  const closed = mine => {
    shut(mine)
    mine.done = true
    if (microphone !== mine) return
    microphone = null
    document.body.classList.remove("listening")
  }

  const wav = ({all, rate}) => {
    const header = new DataView(new ArrayBuffer(44)), bytes = all.length * 2 * N
    const letters = (at, text) => [...text].forEach((letter, i) => header.setUint8(at + i, letter.charCodeAt(0)))
    letters(0, "RIFF"); header.setUint32(4, 36 + bytes, true); letters(8, "WAVEfmt ")
    header.setUint32(16, 16, true); header.setUint16(20, 1, true); header.setUint16(22, 1, true)
    header.setUint32(24, rate, true); header.setUint32(28, 2 * rate, true)
    header.setUint16(32, 2, true); header.setUint16(34, 16, true)
    letters(36, "data"); header.setUint32(40, bytes, true)
    return new Blob([header, ...all], {type: "audio/wav"})
  }

  document.addEventListener("click", event => {
    if (event.target.closest?.("#stop")) stop()
    const part = event.target.closest?.("#details .play")?.closest("li")
    if (part) play(Number(part.dataset.start), Number(part.dataset.end))
  })
  window.addEventListener("beforeunload", event => { if (microphone) event.preventDefault() })

  // what Gradio says in English alone
  const friendly = () => {
    for (const said of document.querySelectorAll(".toast-message-text")) {
      const known = Object.keys(RAW).find(name => RAW[name].test(said.textContent))
      if (known && said.textContent !== say(known)) said.textContent = say(known)
      const title = said.closest(".toast-body").querySelector(".toast-title")?.firstChild
      if (known && title && title.nodeValue !== say("sorry")) title.nodeValue = say("sorry")
    }
  }

  new MutationObserver(() => {
    friendly()
    for (const box of document.querySelectorAll("#transcript textarea, #correction textarea"))
      if (box.lang !== "sv") box.lang = "sv"
    for (const told of document.querySelectorAll("#live, #timing, #compared"))
      if (told.ariaLive !== "polite") told.ariaLive = "polite"  // a screen reader says what changes there
    if (parts().length !== (find("#player .parts")?.children.length ?? 0)) place()
  }).observe(document.body, {childList: true, subtree: true})
  const talk = () => microphone?.talk ?? ""
  const lab = window.lab = {load, save, speak, start, talk, collected, patience_ms: 75000, longest_s: LONGEST_S}
}
"""
"""Run once by the page. `lab.load(url)` gives the player a recording; `lab.save(files, ending)` saves a file that the
page has already, so that nothing of it lies on the server; `lab.speak(language)` tells a screen reader the language;
`lab.start`, `talk`, and `collected` are the open microphone. WORDS, RAW and LONGEST_S come from `script`."""
_RAW = """{
    too_large: /exceeds? (the )?maximum allowed size/i, busy: /currently busy|Queue is full/i,
    lost: /Connection to the server was lost|Connection errored out/i
  }"""


def script() -> str:
    """What the page runs in the browser, with its words."""
    told = {tag: words["browser"] | {"sorry": words["sorry"]} for tag, words in WORDS.items()}
    longest_s = int(app_service.MAX_DURATION_S) - 1  # a second of grace for what is on its way
    begin = f"() => {{\n  const WORDS = {json.dumps(told)}, LONGEST_S = {longest_s}, RAW = {_RAW}\n"
    return SCRIPT.replace("() => {\n", begin, 1)


def theme() -> gr.themes.Base:
    """Calm, and in the system's own fonts."""
    import gradio as gr

    calm = gr.themes.Default(
        primary_hue="blue",
        secondary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    )
    fill, hover = "*primary_700", "*primary_800"  # white letters need this dark a blue
    return calm.set(
        button_primary_background_fill=fill,
        button_primary_background_fill_hover=hover,
        button_primary_background_fill_dark=fill,
        button_primary_background_fill_hover_dark=hover,
    )
