// Keys of the recording page, and the button that records again. Runs after the app's script, in its scope.
;(() => {
  const WAIT_MS = 5000
  const find = selector => document.querySelector(selector)
  const visible = selector => [...document.querySelectorAll(selector)].find(element => element.offsetParent)
  const isTyping = element => element?.matches?.("input, textarea, select, [contenteditable=true]")

  // The sentence on the page, and the one that was there when a recording began: an upload may take longer.
  const sentence = () => find("#sentence p")?.dataset.sentence ?? ""
  let recorded = ""
  const noteRecording = () => {
    recorded = sentence()
  }
  window.lab.sentence = sentence
  window.lab.recordedSentence = () => recorded || sentence()
  window.lab.focusNickname = () => find("#nickname :is(input, textarea)")?.focus()

  document.addEventListener(
    "click",
    event => {
      if (event.target.closest?.("#recording .record-button")) noteRecording()
      // the second click of a double click is not about the sentence that has just come
      if (event.target.closest?.("#skip") && event.detail > 1) event.stopPropagation()
    },
    true
  )
  for (const name of ["change", "drop"])
    document.addEventListener(name, event => event.target.closest?.("#recording") && noteRecording(), true)

  const click = selector => {
    const button = visible(selector)
    if (!button || button.disabled) return false
    button.click()
    return true
  }

  const recordOrStop = () => click("#recording .stop-button") || click("#recording .record-button")

  const again = async () => {
    if (!find("#again") || find("#again").disabled) return
    click("#recording button[aria-label='Clear'], #recording button[aria-label='Rensa']")
    const ends = Date.now() + WAIT_MS
    while (!visible("#recording .record-button") && Date.now() < ends)
      await new Promise(resolve => setTimeout(resolve, 50))
    click("#recording .record-button")
  }

  document.addEventListener("click", event => {
    if (event.target.closest?.("#again")) again()
  })

  // what was pressed by mouse or finger keeps no focus, so that the space key records
  document.addEventListener("pointerup", event => {
    if (event.target.closest?.("#recorder button, #language")) setTimeout(() => document.activeElement?.blur(), 100)
  })

  document.addEventListener("keydown", event => {
    const focused = document.activeElement
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !visible("#sentence")) return
    if (isTyping(focused)) return
    const isOnButton = focused?.matches?.("button, summary, a, audio, [role=slider]")
    const actions = { " ": recordOrStop, Enter: () => click("#next"), r: again, R: again }
    const action = actions[event.key]
    if (!action || (isOnButton && event.key.length !== 1) || (isOnButton && event.key === " ")) return
    event.preventDefault()
    action()
  })

  // After a reload, which also follows a lost connection, a speaker need not remember a nickname that the page made.
  const NICKNAME = "nickname"
  let restored = performance.getEntriesByType("navigation")[0]?.type !== "reload"
  const keepNickname = () => {
    const nickname = visible("#progress strong")?.textContent
    if (nickname) sessionStorage.setItem(NICKNAME, nickname)
    const field = find("#nickname :is(input, textarea)")
    if (restored || !field) return
    restored = true
    field.value = sessionStorage.getItem(NICKNAME) ?? ""
    field.dispatchEvent(new Event("input", { bubbles: true }))
  }

  new MutationObserver(() => {
    keepNickname()
    for (const region of document.querySelectorAll("#status, #sentence, #progress"))
      if (region.ariaLive !== "polite") region.ariaLive = "polite" // screen readers read changes aloud
  }).observe(document.body, { childList: true, subtree: true })
})()
