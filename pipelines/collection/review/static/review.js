// Keys of the review page, and what is sent with each decision. Runs after the app's script, in its scope.
;(() => {
  const LISTEN_S = 1
  const END_S = 0.05 // what browsers may leave out at the end of a clip
  const find = selector => document.querySelector(selector)
  const click = selector => find(selector)?.click()
  const player = () => find("#review-player")
  const play = () => player() && (player().paused ? player().play() : player().pause())

  // A clip without sound counts as heard after the same time on the page.
  const shown = { token: "", since: 0 }
  const token = () => find("#texts")?.dataset.token ?? ""
  const noteClip = () => {
    if (shown.token !== token()) Object.assign(shown, { token: token(), since: performance.now() })
  }

  const playedS = ({ played }) => {
    let seconds = 0
    for (let i = 0; i < played.length; i++) seconds += played.end(i) - played.start(i)
    return seconds
  }

  const isHeard = () => {
    const sound = player()
    if (!sound || sound.error) return performance.now() - shown.since >= LISTEN_S * 1000
    return sound.ended || playedS(sound) >= Math.min(LISTEN_S, sound.duration - END_S)
  }

  // Called by Gradio at the moment of a click, and so by the keys, which click the buttons.
  window.lab.pressed = () => {
    noteClip()
    return { token: token(), heard: isHeard() }
  }

  const edit = () => {
    const field = find("#correction textarea")
    field?.focus()
    field?.setSelectionRange(field.value.length, field.value.length)
  }

  const restore = () => {
    const field = find("#correction textarea")
    if (field && find("#texts")) {
      field.value = find("#texts").dataset.text
      field.dispatchEvent(new Event("input", { bubbles: true }))
    }
    document.activeElement?.blur()
  }

  const save = field => {
    field.blur()
    click("#save")
  }

  const actions = {
    a: () => click("#accept"),
    r: () => click("#reject"),
    s: () => click("#skip"),
    b: () => click("#back"),
    e: edit,
    " ": play
  }

  document.addEventListener("keydown", event => {
    const field = event.target.closest?.("#correction textarea")
    const isModified = event.ctrlKey || event.metaKey || event.altKey
    if (event.repeat || event.isComposing) return
    if (field && event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault()
      return save(field)
    }
    if (event.key === "Escape") return field ? restore() : document.activeElement?.blur()
    if (isModified || event.target.closest?.("input, textarea, select") || !find("#before, #done")) return
    const action = actions[event.key.toLowerCase()]
    if (!action || (event.key === " " && event.target.closest?.("button, audio"))) return
    event.preventDefault()
    action()
  })

  // the second click of a double click is not about the clip that has just come
  document.addEventListener(
    "click",
    event => {
      if (event.target.closest?.("#skip, #back") && event.detail > 1) event.stopPropagation()
    },
    true
  )

  // what was pressed by mouse or finger keeps no focus, so that the space key plays and decides nothing
  document.addEventListener("pointerup", event => {
    if (event.target.closest?.(".actions button, #language, #review-player"))
      setTimeout(() => document.activeElement?.blur(), 100)
  })

  // The reviewer's name survives a reload, which also follows a lost connection.
  const REVIEWER = "reviewer"
  document.addEventListener("input", event => {
    if (event.target.closest?.("#reviewer")) sessionStorage.setItem(REVIEWER, event.target.value)
  })
  let isRestored = false
  const restoreReviewer = () => {
    const field = find("#reviewer :is(input, textarea)")
    if (isRestored || !field) return
    isRestored = true
    field.value = sessionStorage.getItem(REVIEWER) ?? ""
    field.dispatchEvent(new Event("input", { bubbles: true }))
  }

  new MutationObserver(() => {
    noteClip()
    restoreReviewer()
    for (const region of document.querySelectorAll("#progress, #clip"))
      if (region.ariaLive !== "polite") region.ariaLive = "polite" // screen readers read changes aloud
  }).observe(document.body, { childList: true, subtree: true, attributes: true, attributeFilter: ["data-token"] })
})()
