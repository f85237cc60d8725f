// Runs before the page is drawn, so that it does not flash in the other colours.
const moejetTheme = localStorage.getItem('moejet.theme');
if (moejetTheme === 'light' || moejetTheme === 'dark') document.documentElement.dataset.theme = moejetTheme;
