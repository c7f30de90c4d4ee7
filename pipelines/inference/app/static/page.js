// Connects the page to its player and its microphone. Gradio's events call the functions of `window.lab`.

import { createMicrophone } from "./microphone.js"
import { createMicrophoneHelp } from "./microphone_help.js"
import { createPlayer } from "./player.js"

// Messages that Gradio shows in English only, by the name of our own message.
const GRADIO_MESSAGES = {
  too_large: /exceeds? (the )?maximum allowed size/i,
  busy: /currently busy|Queue is full/i,
  lost: /Connection to the server was lost|Connection errored out/i
}

// Titles that Gradio gives to messages of its own.
const GRADIO_TITLES = /^\s*(error|warning)\s*$/i

// Time after which the box of the transcript has the size of its text.
const GROW_MS = 150

export function startPage({ messages, maxDurationS, speech, workletSource }) {
  const settings = { requestTimeoutMs: 75000, maxDurationS }
  const message = name => (messages[document.documentElement.lang] ?? messages.en)[name]
  const player = createPlayer()
  const { explain, watch } = createMicrophoneHelp({ message })
  const microphone = createMicrophone({ player, message, explain, workletSource, settings })
  watch()

  const saveFile = (files, extension) => {
    if (!files) return
    const link = document.createElement("a")
    link.href = URL.createObjectURL(new Blob([files[extension]], { type: "text/plain;charset=utf-8" }))
    link.download = `transcript.${extension}`
    link.click()
    setTimeout(() => URL.revokeObjectURL(link.href), 10000)
  }

  const setLanguage = language => {
    document.documentElement.lang = language
    for (const element of document.querySelectorAll(`[data-label-${language}]`))
      element.setAttribute("aria-label", element.getAttribute(`data-label-${language}`))
  }

  const translateGradioMessages = () => {
    for (const text of document.querySelectorAll(".toast-message-text")) {
      const name = Object.keys(GRADIO_MESSAGES).find(key => GRADIO_MESSAGES[key].test(text.textContent))
      if (name && text.textContent !== message(name)) text.textContent = message(name)
    }
    for (const { firstChild: title } of document.querySelectorAll(".toast-title"))
      if (GRADIO_TITLES.test(title?.nodeValue)) title.nodeValue = message("sorry")
  }

  // What Gradio has no option for. It may render these elements again at any time.
  const setAccessibilityAttributes = () => {
    for (const box of document.querySelectorAll("#transcript textarea, #correction textarea"))
      if (box.lang !== speech) box.lang = speech
    for (const region of document.querySelectorAll("#live, #timing, #compared"))
      if (region.ariaLive !== "polite") region.ariaLive = "polite" // screen readers read changes aloud
  }

  // Browsers record webm or mp4 and name the type video/… even without a picture: Gradio's upload would refuse it.
  const FILE_INPUT = "#recording input[type=file]"
  const isVideo = file => /^video\/|^$/.test(file.type)
  const asAudio = file =>
    new File([file], file.name, { type: file.type.replace("video/", "audio/") || "audio/unknown" })

  const setAudioFiles = (input, files) => {
    const transfer = new DataTransfer()
    for (const file of files) transfer.items.add(isVideo(file) ? asAudio(file) : file)
    input.files = transfer.files
  }

  const acceptVideoTypes = () => {
    for (const input of document.querySelectorAll(FILE_INPUT))
      if (input.accept && !input.accept.includes("video/")) input.accept += ",video/webm,video/mp4"
  }

  // Both run before Gradio's own handlers.
  document.addEventListener(
    "change",
    event => {
      const input = event.target
      if (input.matches?.(FILE_INPUT) && [...input.files].some(isVideo)) setAudioFiles(input, input.files)
    },
    true
  )
  document.addEventListener(
    "drop",
    event => {
      const input = event.target.closest?.("#recording")?.querySelector("input[type=file]")
      if (!input || ![...event.dataTransfer.files].some(isVideo)) return
      event.preventDefault()
      event.stopPropagation()
      setAudioFiles(input, event.dataTransfer.files)
      input.dispatchEvent(new Event("change", { bubbles: true }))
    },
    true
  )

  // On phones and in a notebook's frame the transcript is below what can be seen.
  const showTranscript = () =>
    setTimeout(() => document.querySelector("#transcript")?.scrollIntoView({ block: "nearest" }), GROW_MS)

  document.addEventListener("click", event => {
    if (event.target.closest?.("#transcribe")) showTranscript()
    if (event.target.closest?.("#stop")) microphone.stop()
    const segment = event.target.closest?.("#details .play")?.closest("li")
    if (segment) player.playSegment(segment)
  })

  new MutationObserver(() => {
    translateGradioMessages()
    setAccessibilityAttributes()
    acceptVideoTypes()
    if (player.hasUndrawnSegments()) player.drawSegments()
  }).observe(document.body, { childList: true, subtree: true })

  window.lab = {
    loadRecording: player.load,
    saveFile,
    setLanguage,
    showTranscript,
    startMicrophone: microphone.start,
    sessionId: microphone.sessionId,
    transcriptReceived: microphone.transcriptReceived,
    settings
  }
}
